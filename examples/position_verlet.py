import diffrax as dfx
import equinox as eqx
import numpy as np

from reversax import schemes


class DriftKickDrift(schemes.AbstractNative):
    arithmetic: schemes.AbstractArithmetic
    interpolation_cls: type = eqx.field(
        static=True, default=dfx.LocalLinearInterpolation
    )

    def fields(self, terms, args):
        return schemes.fields_of_two(terms, args)

    def moves(self, span, control, lost):
        leg = lambda t, factor, which: schemes.Leg(
            t, span.end, np.float32(factor), control, which
        )
        drift = lambda t: schemes.Add(leg(t, 0.5, 1), into=1, reads=0)
        kick = schemes.Add(leg(span.start, 1.0, 0), into=0, reads=1)
        return drift(span.start), kick, drift(span.end)


class PositionVerlet(schemes.AbstractNativeSolver):
    term_structure = (dfx.ODETerm, dfx.ODETerm)
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def reversible_scheme(self, arithmetic):
        return DriftKickDrift(arithmetic)

    def func(self, terms, t0, y0, args):
        (first, second), (p, q) = terms, y0
        return first.vf(t0, q, args), second.vf(t0, p, args)
