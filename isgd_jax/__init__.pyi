# The public names, once: lazy_loader reads this file at run time, type checkers read it as it is.
from . import proposal as proposal
from . import samplers as samplers
from . import scorers as scorers
from . import table as table
from . import variance as variance
from .factored import gram as gram
from .factored import inner as inner
from .factored import norms as norms
from .factored import stack as stack
from .factored import weighted_mean as weighted_mean
from .gradients import per_example_grads as per_example_grads
from .gradients import per_example_value_and_grad as per_example_value_and_grad
from .gradients import stacked_per_example_grads as stacked_per_example_grads
from .reweight import importance_weighting as importance_weighting
from .sharded import sharded as sharded
from .typing import Draw as Draw
