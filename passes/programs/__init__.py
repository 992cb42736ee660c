# SPDX-License-Identifier: Apache-2.0
"""Row programs: regions of a graph that use each row of a head's logits by itself, whatever their operations mean.

`axes.py` tells rows from all else, `operations.py` what each aten operation does to them, `record.py` runs a region node by
node and writes it down, `region.py` finds where one begins and ends in a graph, `heads.py` and `scales.py` say what its heads
are, `emit.py` makes the program of one row of it, `write.py` puts an operator in its place, and `linear.py` has its gradients
made in the forward. `tier.py` is all of it.
"""
