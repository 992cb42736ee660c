"""What the examples share: text to train on, memory counting, running the same job several ways, and the report."""
