"""Numbers from predictions tables: numpy, scipy, sklearn and pandas only."""
