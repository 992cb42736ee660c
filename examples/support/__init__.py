# SPDX-License-Identifier: Apache-2.0
"""What the examples share: text to train on, memory counting, running the same job several ways, and the report."""
