"""A finished run as a tool: files that load without code, a network that says when it cannot tell."""
