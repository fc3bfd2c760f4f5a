import jax

# Most oracles need double precision; single precision is asked for by dtype.
jax.config.update("jax_enable_x64", True)
