"""What the observed site says."""
