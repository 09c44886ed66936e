"""Memory for AI assistants in Redis: the right memories in milliseconds."""
