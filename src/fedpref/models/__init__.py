"""Language models and predictors as functions of trees."""
