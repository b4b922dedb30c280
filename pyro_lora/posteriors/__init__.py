"""What a posterior is, and each kind of it."""
