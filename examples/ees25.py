from typing import ClassVar

import diffrax as dfx
import numpy as np


class EES25(dfx.AbstractERK):
    tableau: ClassVar[dfx.ButcherTableau] = dfx.ButcherTableau(
        a_lower=(np.array([1 / 3]), np.array([-5 / 48, 15 / 16])),
        b_sol=np.array([1 / 10, 1 / 2, 2 / 5]),
        b_error=np.array([1 / 10 - 1, 1 / 2, 2 / 5]),  # Compared with Euler's method.
        c=np.array([1 / 3, 5 / 6]),
    )
    interpolation_cls: ClassVar = dfx.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 2

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        back = terms, t1, t0, y1, args, solver_state, made_jump
        y0, _, dense_info, solver_state, result = self.step(*back)
        return y0, dense_info, solver_state, result
