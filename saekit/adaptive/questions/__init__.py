"""What one would ask of the features of a model that decides, model by model, each answer beside its controls."""
