"""The pruned model: its configuration and modules. Two files are copied into every checkpoint."""
