"""Full DreamBooth whose optimizer's steps are smooth in the gradient. `torchrun smooth.py EPSILON SUBJECTS RUN.yaml`

Adam divides by the gradient's own size: of a gradient that is nothing but rounding, as a key's bias has it, it makes a
whole step in a direction that rounding chose. With an epsilon above the gradients', rounding stays as small as it is.
"""

import sys

from controlbooth.trainer.dreambooth import full, train
from controlbooth.trainer.engine.distributed import end_process

epsilon = float(sys.argv.pop(1))
settings = full.optimizer_settings


def smooth(config, task):
    return settings(config, task).model_copy(update=dict(epsilon=epsilon))


full.optimizer_settings = smooth
end_process(train.main())
