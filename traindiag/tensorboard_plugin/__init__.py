"""The tab "Training diagnostics" inside TensorBoard."""
