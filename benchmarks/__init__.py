"""Measurements that take longer than a test, each with a committed table."""
