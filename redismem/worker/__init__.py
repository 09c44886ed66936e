"""The worker: makes derived data in the background."""
