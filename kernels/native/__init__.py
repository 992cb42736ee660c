# SPDX-License-Identifier: Apache-2.0
"""What is compiled for a CPU: walks over tiles, and a head with its loss as a whole."""
