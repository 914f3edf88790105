"""Language models and predictors as functions of trees."""

import logging

# PEFT imports bitsandbytes wherever it is installed, which then tells of kernels that it misses
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
