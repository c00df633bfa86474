from . import gate as gate
from . import monitor as monitor
from . import rolling as rolling
from .second_moments import Moments as Moments
from .second_moments import from_draws as from_draws
from .second_moments import mean_grad_norm_sq as mean_grad_norm_sq
from .second_moments import moments as moments
from .second_moments import trace_covariance as trace_covariance
