"""The pages: one to chat in, one that documents the API. Plain files, all from this server."""
