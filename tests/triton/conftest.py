# SPDX-License-Identifier: Apache-2.0
"""The kernels run in Triton's interpreter in a process of its own: `test_interpreter.py` starts it."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
