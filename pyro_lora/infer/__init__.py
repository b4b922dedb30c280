"""Model and batches -> posterior, which is a guide."""
