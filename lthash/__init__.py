"""Deep hashing for image retrieval when the classes have a long tail.

    import lthash as lh
    data = lh.load('silk')
    net, loss = lh.build('orthohash', bits=32, classes=len(data.classes), size=64)

Every name of `__all__` is loaded from its module when it is first used, so `import lthash` takes no time.
"""
__version__ = "0.1.0"

import importlib
from typing import Any

_PUBLIC = {
    'data.base': ('ImageSet', 'Split', 'retrieval_split'),
    'data.datasets': ('load',),
    'data.longtail': ('class_counts', 'imbalance_factor', 'take'),
    'evaluation.hamming': ('pack', 'unpack'),
    'evaluation.metrics': ('mean_average_precision', 'retrieval_report'),
    'models.backbones': ('build_backbone', 'load_weights', 'save_weights'),
    'models.hashnet': ('HashNet',),
    'models.training': ('TrainConfig', 'encode', 'fit', 'predict'),
    'supervised.methods': ('build',),
    'unsupervised.base': ('UnsupervisedMethod', 'fit_codes', 'make_method'),
    'diffusion.pipelines': ('load_pipeline',),
    'diffusion.personalize': ('personalize',),
    'diffusion.generate': ('generate',),
    'diffusion.synthetic': ('SyntheticConfig',),
    'augmentation.plan': ('AugmentConfig',),
    'search.index': ('BinaryIndex',),
    'experiments.trials': ('Trial', 'run'),
    'experiments.unsupervised_trials': ('UnsupervisedTrial',),
    'experiments.augmented_trials': ('AugmentedTrial',),
    'experiments.baseline_trials': ('BaselineTrial',),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    "A public name, imported from its module at first use (PEP 562)."
    if name not in _HOME:
        names = ', '.join(__all__)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}; its public names are {names}')
    value = getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
