"""Instructions that compute, as lines of Python."""

from __future__ import annotations

import numpy as np

from .operands import NUMPY, SIZE, SPECIAL, Operands, Unknown, vector

_COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_SIGN = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_PAIRS = ("f16x2", "bf16x2")
_TO_INTEGER = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


class Computing(Operands):
    """A method for each instruction: `do_add` for add.f32."""

    @property
    def t(self) -> str:
        """The type of the instruction, the last part of its name."""
        return self.x.parts[-1]

    def operand(self, i: int, t: str | None = None) -> str:
        return self.read(self.x.args[i], t or self.t)

    def result(self, e: str, t: str | None = None) -> None:
        self.put(self.x.args[0], e, t or self.t)

    def do_mov(self) -> None:
        to, of = self.x.args
        bits = int(self.t[1:]) if self.t != "pred" else 1
        if to.startswith("{"):
            parts = vector(to)
            width = bits // len(parts)
            self.lines.append(f"v = {self.read(of, self.t)}")
            for i, register in enumerate(parts):
                self.put(register, f"(v >> {i * width}).astype('u{width // 8}')", f"b{width}")
        elif of.startswith("{"):
            parts = vector(of)
            width = bits // len(parts)
            each = [f"({self.read(v, f'b{width}')}.astype('u{bits // 8}') << {i * width})" for i, v in enumerate(parts)]
            self.result(" | ".join(each))
        elif self.is_register(of) and self.classes[self.index[of]] == self.classes[self.index[to]]:
            held = self.classes[self.index[to]]
            self.result(f"R[{self.index[of]}]", "pred" if held == "pred" else f"b{8 * SIZE[held]}")
        elif self.is_register(of) or of in SPECIAL or of in self.offsets:
            self.result(self.read(of, self.t))
        else:
            self.result(f"M.full({self.read(of, self.t)})")

    def do_cvta(self) -> None:
        self.result(self.operand(1))

    # --- arithmetic
    def _binary(self) -> None:
        op, t = self.x.parts[0], self.t
        sign = _SIGN[op]
        if "sat" in self.x.parts:
            raise Unknown("saturation")
        if t in (*_PAIRS, "s16x2", "u16x2"):
            kind = t if t in _PAIRS else "u16x2"
            e = f"packed('{kind}', lambda x, y: x {sign} y, {self.operand(1, 'b32')}, {self.operand(2, 'b32')})"
        elif t == "f16":
            e = f"({self.operand(1)}.astype('f4') {sign} {self.operand(2)}.astype('f4')).astype('f2')"
        elif "ftz" in self.x.parts:
            e = f"ftz(ftz({self.operand(1)}) {sign} ftz({self.operand(2)}))"
        else:
            e = f"{self.operand(1)} {sign} {self.operand(2)}"
        self.result(e)

    do_add = do_sub = do_and = do_or = do_xor = _binary

    def do_mul(self) -> None:
        if self.t[0] in "us" and self.t[-2:] != "x2":
            self._product("")
        else:
            self._binary()

    def do_mad(self) -> None:
        self._product(self.x.args[3])

    def _product(self, added: str) -> None:
        """Of integers: low or high half, or all of it, plus something."""
        mode, t = self.x.parts[1], self.t
        a, b = self.operand(1), self.operand(2)
        if mode == "wide":
            t = _WIDER[t]
            e = f"{a}.astype('{NUMPY[t]}') * {b}.astype('{NUMPY[t]}')"
        elif mode == "hi" and t.endswith("64"):
            e = f"mulhi64({a}, {b})"
        elif mode == "hi":
            wide = NUMPY[_WIDER[t]]
            e = f"(({a}.astype('{wide}') * {b}.astype('{wide}')) >> {t[1:]}).astype('{NUMPY[t]}')"
        elif mode == "lo":
            e = f"{a} * {b}"
        else:
            raise Unknown(self.x.op)
        self.result(f"{e} + {self.read(added, t)}" if added else e, t)

    def do_fma(self) -> None:
        if self.t in _PAIRS:
            args = ", ".join(self.operand(i, "b32") for i in (1, 2, 3))
            self.result(f"packed_fma('{self.t}', {args}, {'relu' in self.x.parts})")
            return
        f = {"f32": "fma32", "f64": "fma64", "f16": "fma16", "bf16": "fma_bf16"}[self.t]
        e = f"{f}({self.operand(1)}, {self.operand(2)}, {self.operand(3)})"
        self.result(f"ftz({e})" if "ftz" in self.x.parts else e)

    def _extremum(self) -> None:
        op, t = self.x.parts[0], self.t
        floating = t[0] == "f" or t in ("bf16", *_PAIRS)
        name = {"max": ("np.maximum", "np.fmax"), "min": ("np.minimum", "np.fmin")}[op]
        f = name[floating and "NaN" not in self.x.parts]
        if t in _PAIRS:
            self.result(f"packed('{t}', {f}, {self.operand(1, 'b32')}, {self.operand(2, 'b32')})")
        elif len(self.x.args) == 4:
            self.result(f"{f}({f}({self.operand(1)}, {self.operand(2)}), {self.operand(3)})")
        else:
            self.result(f"{f}({self.operand(1)}, {self.operand(2)})")

    do_min = do_max = _extremum

    def do_not(self) -> None:
        self.result(f"~{self.operand(1)}")

    def do_neg(self) -> None:
        pair = self.t in _PAIRS
        self.result(f"{self.operand(1, 'b32')} ^ np.uint32(0x80008000)" if pair else f"-{self.operand(1)}")

    def do_abs(self) -> None:
        pair = self.t in _PAIRS
        self.result(f"{self.operand(1, 'b32')} & np.uint32(0x7fff7fff)" if pair else f"np.abs({self.operand(1)})")

    def _division(self) -> None:
        op, t = self.x.parts[0], self.t
        if t[0] != "f":
            self.result(f"{op}({self.operand(1)}, {self.operand(2)})")
            return
        e = f"{self.operand(1)} / {self.operand(2)}"
        if t == "f32" and {"full", "approx"} & {*self.x.parts}:
            e = f"M.near({e})"
        self.result(f"ftz({e})" if "ftz" in self.x.parts else e)

    do_div = do_rem = _division

    def _special(self) -> None:
        """What GPUs approximate."""
        op, t, ftz = self.x.parts[0], self.t, "ftz" in self.x.parts
        if t in _PAIRS:
            self.result(f"packed_exact('{t}', '{op}', {self.operand(1, 'b32')})")
            return
        e = f"exact('{op}', {'ftz' if ftz else ''}({self.operand(1)}))"
        if "approx" in self.x.parts and t == "f32":
            e = f"M.near({e})"
        self.result(f"ftz({e})" if ftz else e)

    do_ex2 = do_lg2 = do_rcp = do_rsqrt = do_sqrt = do_tanh = do_sin = do_cos = _special

    def do_copysign(self) -> None:
        self.result(f"np.copysign({self.operand(2)}, {self.operand(1)})")

    # --- bits
    def _shift(self) -> None:
        op, t, amount = self.x.parts[0], self.t, self.x.args[2]
        if self.is_register(amount):
            self.result(f"{op}({self.operand(1)}, {self.read(amount, 'b32')})")
            return
        n, width = int(amount, 0), int(t[1:])
        if n >= width:
            self.result(f"{self.operand(1)} >> {width - 1}" if t[0] == "s" else f"{self.operand(1)} & 0")
        else:
            self.result(f"{self.operand(1)} {'<<' if op == 'shl' else '>>'} {self.constant(str(n), t)}")

    do_shl = do_shr = _shift

    def do_bfe(self) -> None:
        self.result(f"bfe({self.operand(1)}, {self.operand(2, 'b32')}, {self.operand(3, 'b32')})")

    def do_bfi(self) -> None:
        self.result(f"bfi({self.operand(1)}, {self.operand(2)}, {self.operand(3, 'b32')}, {self.operand(4, 'b32')})")

    def do_prmt(self) -> None:
        if self.t != "b32":
            raise Unknown(self.x.op)
        self.result(f"prmt({self.operand(1)}, {self.operand(2)}, {self.operand(3)})")

    def do_shf(self) -> None:
        _, direction, mode, _ = self.x.parts
        self.result(f"shf('{direction}', '{mode}', {self.operand(1)}, {self.operand(2)}, {self.operand(3)})")

    def do_lop3(self) -> None:
        self.result(f"lop3({self.operand(1)}, {self.operand(2)}, {self.operand(3)}, {int(self.x.args[4], 0)})")

    def _count(self) -> None:
        op = self.x.parts[0]
        self.result(f"{op}({self.operand(1)})", self.t if op == "brev" else "b32")

    do_popc = do_clz = do_brev = _count

    # --- choices
    def do_selp(self) -> None:
        t = "b" + self.t[1:] if self.t[0] in "uf" and "x" not in self.t else self.t
        self.result(f"where({self.operand(3, 'pred')}, {self.operand(1, t)}, {self.operand(2, t)})", t)

    def do_testp(self) -> None:
        self.result(f"testp('{self.x.parts[1]}', {self.operand(1)})", "pred")

    def do_setp(self) -> None:
        kind, t, args = self.x.parts[1], self.t, self.x.args
        to = args[0].split("|")
        if t in _PAIRS:
            self.lines.append(
                f"u, v = compared_pairs('{t}', '{kind}', {self.operand(1, 'b32')}, {self.operand(2, 'b32')})"
            )
            self.put(to[0], "u", "pred")
            self.put(to[1], "v", "pred")
            return
        a, b = self.operand(1), self.operand(2)
        simple = kind in _COMPARE and not (kind == "ne" and (t[0] == "f" or t == "bf16"))
        e = f"{a} {_COMPARE[kind]} {b}" if simple else f"compared('{kind}', {a}, {b})"
        combine = next((c for c in ("and", "or", "xor") if c in self.x.parts[2:-1]), None)
        if combine:
            e = f"({e}) {_SIGN[combine]} {self.operand(3, 'pred')}"
        if not any(self.is_register(v.lstrip("!")) or v in SPECIAL for v in args[1:]):
            e = f"M.full({e})"
        self.lines.append(f"u = {e}")
        self.put(to[0], "u", "pred")
        if len(to) > 1:
            self.put(to[1], "~u", "pred")

    # --- conversions
    def do_cvt(self) -> None:
        parts = self.x.parts
        to, of = parts[-2:]
        mode = next((m for m in parts[1:-2] if m in ("rn", "rz", "rm", "rp", "rna", *_TO_INTEGER)), None)
        if to in _PAIRS and of == "f32":
            upper, lower = self.operand(1, "f32"), self.operand(2, "f32")
            self.result(f"converted_pair('{to}', '{mode}', {upper}, {lower}, {'relu' in parts})", "b32")
            return
        if to == "tf32":
            self.result(f"to_tf32('{mode}', {self.operand(1, 'b32')})", "b32")
            return
        if to not in NUMPY or of not in NUMPY or to in _PAIRS or of in _PAIRS or "relu" in parts:
            raise Unknown(self.x.op)
        self.result(*self._converted(to, of, mode, self.operand(1, of)))

    def _converted(self, to: str, of: str, mode: str | None, v: str) -> tuple[str, str]:
        """The expression v of type `of` as one of type `to`, and what type that has in NumPy."""
        dtype = NUMPY[to]
        if to == "bf16":
            if of == "f32":
                return (f"f32_to_bf16({v}, '{mode}')", "u16") if mode == "rz" else (v, "bf16")
            return f"f64_to_bf16({v}.astype('f8'))", "u16"
        if of == "bf16" and to in ("f32", "f64"):
            return (v if to == "f32" else f"{v}.astype('f8')"), to
        if to[0] in "us" and of[0] in "us":
            return (f"saturated({v}, '{dtype}')" if "sat" in self.x.parts else f"{v}.astype('{dtype}')"), to
        if to[0] in "us":
            return f"to_integer({_TO_INTEGER[mode or '']}({v}), '{dtype}')", to
        if of[0] in "us":
            return (f"{v}.astype('f8').astype('f2')" if to == "f16" else f"{v}.astype('{dtype}')"), to
        if mode in _TO_INTEGER:
            return f"{_TO_INTEGER[mode]}({v}).astype('{dtype}')", to
        if mode in ("rz", "rm", "rp") and np.dtype(dtype).itemsize < np.dtype(NUMPY[of]).itemsize:
            return f"directed('{mode}', {v}, '{dtype}')", to
        return f"{v}.astype('{dtype}')", to
