"""Is the result still right? Perplexity, tasks, round trips through loaders."""
