"""From settings, machines and the shapes of models to one resolved launch; nothing else derives."""
