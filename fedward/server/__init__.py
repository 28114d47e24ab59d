"""The coordinator's side: rounds, evaluation, models, central training."""
