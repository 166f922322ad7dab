"""Two ranks, of which the second has more to do than a collective of the others waits for.

`torchrun late.py PROGRAM MODULE FUNCTION ARGUMENT ...`: PROGRAM is run with the arguments.
FUNCTION of MODULE, as which it is called there, is the work that ranks do apart: the second one takes some seconds
longer for it, and collectives end after one from then on.
"""

import datetime
import importlib
import os
import sys
import time

from torch.distributed import distributed_c10d

from controlbooth.trainer.engine.distributed import end_process

_, program, name, function, *arguments = sys.argv
sys.argv = [program, *arguments]
module = importlib.import_module(f"controlbooth.{name}")
work = getattr(module, function)


def work_apart(*given):
    outcome = work(*given)
    distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))
    if os.environ["RANK"] == "1":
        time.sleep(5)
    return outcome


setattr(module, function, work_apart)
end_process(importlib.import_module(f"controlbooth.{program}").main())
