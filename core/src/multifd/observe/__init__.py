"""Who looks on: the hooks, the guarded calls, and the observers that come with core."""
