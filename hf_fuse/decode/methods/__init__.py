"""One file per decode method. Its function takes live models and returns what has their ``generate()``.

The names of its positional parameters are the keys under which a recipe names the models (``model``, ``experts``,
``base_model``, ...); its keyword-only arguments are the recipe's ``parameters``.
"""
