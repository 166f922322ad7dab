"""nn.Modules for one device, and their weights."""

import logging

_OF_TORCHAO = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "<enum '",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}
"""Logger -> how its lines begin that say nothing to anybody here: diffusers and transformers import torchao where it is
installed, for kernels of other machines and for files that controlbooth does not write."""

for _name, _begins in _OF_TORCHAO.items():
    logging.getLogger(_name).addFilter(lambda record, begins=_begins: not record.getMessage().startswith(begins))
