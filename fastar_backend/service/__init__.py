"""Many streams on one engine: who may come, who is next, what is kept when they go."""
