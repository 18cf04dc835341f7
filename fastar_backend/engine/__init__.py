"""The stream engine: state per stream, and one step that advances a batch of streams by a chunk."""
