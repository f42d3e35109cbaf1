"""Training tasks, the compiled step, its settings and what a run tells of itself."""
