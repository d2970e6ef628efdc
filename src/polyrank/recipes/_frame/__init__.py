"""What every run goes through: recipes by name, configuration, log of training."""
