"""What a distribution's user space computes: run on two processors, it prints the same.

Needs no more than Debian's python3 and openssl.  Each line is a name and a digest of results: of the C
library's mathematics in double and in 80-bit precision, big numbers, compression, digests, ciphers,
signatures, TLS, threads.  linux_userland.py runs it in a guest and on the host.
"""

from __future__ import annotations

import bz2
import cmath
import ctypes
import decimal
import fractions
import hashlib
import itertools
import json
import lzma
import math
import random
import re
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

Result = Iterator[tuple[str, object]]
RANDOM = random.Random(5)
NUMBERS = [RANDOM.uniform(-1e3, 1e3) for _ in range(3000)]
ANYWHERE = "sin cos tan exp exp2 expm1 atan sinh cosh tanh asinh erf gamma lgamma cbrt"
POSITIVE = "acos asin atanh log log2 log10 log1p sqrt"
LONG = "sinl cosl expl exp2l logl log2l sqrtl tanl atanl cbrtl erfl tgammal"
DATA = RANDOM.randbytes(40000) + b"abc" * 20000


def mathematics() -> Result:
    few = NUMBERS[:300]
    for name in ANYWHERE.split():
        function = getattr(math, name)
        yield name, [function(x / 50) for x in few]
    for name in POSITIVE.split():
        function = getattr(math, name)
        yield name, [function(abs(x) / 1001 + 1e-9) for x in few]
    yield "pow", [abs(x) ** (y / 200) for x, y in itertools.pairwise(few)]
    yield "fmod", [math.fmod(x, 3.7) + math.remainder(x, 2.9) for x in NUMBERS]
    yield "round", [(math.floor(x), math.ceil(x), math.trunc(x), round(x, 3), round(x)) for x in NUMBERS]
    yield "sums", (math.fsum(NUMBERS), math.hypot(*NUMBERS), math.dist(NUMBERS, NUMBERS[::-1]))
    yield "complex", [cmath.exp(complex(x / 900, x / 800)) * cmath.sqrt(x) for x in few]
    yield "text", [(float(repr(x)), f"{x:.17g}", f"{x:.3f}", x.hex()) for x in NUMBERS]
    yield "packed", struct.unpack("500f", struct.pack("500f", *NUMBERS[:500]))


def long_doubles() -> Result:
    """The C library computes these with x87 instructions."""
    library = ctypes.CDLL("libm.so.6")
    for name in LONG.split():
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_longdouble, [ctypes.c_longdouble]
        yield name, [function(abs(x) / 100) for x in NUMBERS[:200]]
    buffer = ctypes.create_string_buffer(100)
    snprintf = ctypes.CDLL("libc.so.6").snprintf
    snprintf.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_longdouble]
    texts = []
    for x in NUMBERS[:200]:
        for form in (b"%.25Lg", b"%La"):
            snprintf(buffer, 100, form, x * 1.1)
            texts.append(buffer.value)
    yield "printf", texts


def big_numbers() -> Result:
    bits = RANDOM.getrandbits
    yield "modular powers", [pow(bits(1024), bits(256), bits(1024) | 1) for _ in range(8)]
    yield "quotients", [divmod(bits(4000), bits(1500) | 1) for _ in range(50)]
    yield "root", math.isqrt(bits(3000))
    yield "decimal", decimal.Decimal(3).exp(decimal.Context(prec=200))
    yield "fraction", sum((fractions.Fraction(1, n) for n in range(1, 300)), fractions.Fraction())


def data() -> Result:
    yield "zlib", (zlib.compress(DATA, 6), zlib.crc32(DATA), zlib.adler32(DATA))
    yield "bz2", bz2.compress(DATA)
    yield "lzma", lzma.compress(DATA, preset=1)
    assert lzma.decompress(lzma.compress(DATA, preset=1)) == DATA
    yield "json", json.loads(json.dumps([NUMBERS, {f"k{i}": str(i) * 9 for i in range(500)}]))
    yield "re", re.findall(r"(\w+)@(\w+)\.com", " ".join(f"u{i}@h{i * 7}.com" for i in range(2000)))
    yield "sort", sorted(NUMBERS)


def digests() -> Result:
    for name in sorted(hashlib.algorithms_guaranteed):
        digest = hashlib.new(name, DATA)
        yield name, digest.digest(100) if name.startswith("shake") else digest.digest()  # type: ignore[call-arg]
    yield "pbkdf2", hashlib.pbkdf2_hmac("sha512", b"x", b"salt", 2000)
    yield "scrypt", hashlib.scrypt(b"x", salt=b"y", n=1024, r=8, p=1)


def openssl(*arguments: str | Path) -> bytes:
    return subprocess.run(["openssl", *arguments], input=DATA, capture_output=True, check=True).stdout


def ciphers() -> Result:
    key = "00112233445566778899aabbccddeeff1f2e3d4c5b6a79880716253443526170"
    for name, size in (
        ("aes-128-cbc", 16), ("aes-192-ofb", 24), ("aes-256-ctr", 32), ("aes-256-ecb", 32), ("aes-256-cfb", 32),
        ("camellia-256-cbc", 32), ("aria-256-cbc", 32), ("chacha20", 32), ("sm4-cbc", 16),
        ("des-ede3-cbc", 24),
    ):  # fmt: skip
        vector = "0f" * (0 if name.endswith("ecb") else 8 if name.startswith("des") else 16)
        yield name, openssl("enc", f"-{name}", "-K", key[: size * 2], *(["-iv", vector] if vector else []))


def signatures(directory: Path) -> Result:
    """Keys are random: what counts is that what was signed is verified."""
    key, public, text, signature = (directory / name for name in ("key", "public", "text", "signature"))
    text.write_bytes(DATA[:1000])
    for algorithm, option in (
        ("RSA", "rsa_keygen_bits:2048"), ("EC", "ec_paramgen_curve:P-256"), ("EC", "ec_paramgen_curve:P-384"),
        ("EC", "ec_paramgen_curve:secp256k1"), ("ED25519", ""), ("ED448", ""),
    ):  # fmt: skip
        options = ["-pkeyopt", option] if option else []
        openssl("genpkey", "-algorithm", algorithm, *options, "-out", key)
        openssl("pkey", "-in", key, "-pubout", "-out", public)
        openssl("pkeyutl", "-sign", "-inkey", key, "-rawin", "-in", text, "-out", signature)
        answer = openssl(
            "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", text, "-sigfile", signature
        )
        yield f"{algorithm} {option}", answer


def tls(directory: Path) -> Result:
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "10", "-subj", "/CN=x")
    openssl(*new, "-keyout", key, "-out", certificate)
    for suite in (
        "",
        "ECDHE-RSA-CHACHA20-POLY1305",
        "ECDHE-RSA-AES256-SHA384",
        "ECDHE-RSA-AES128-GCM-SHA256",
    ):
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        server.load_cert_chain(certificate, key)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        if suite:
            for context in (server, client):
                context.maximum_version = ssl.TLSVersion.TLSv1_2
                context.set_ciphers(f"{suite}:@SECLEVEL=0")
        yield suite or "TLS 1.3", _conversation(server, client)


def _conversation(server: ssl.SSLContext, client: ssl.SSLContext) -> object:
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    there, here = server.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up)
    waiting = [here, there]
    while waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)
    here.write(DATA[:16000])
    received = b""
    while len(received) < 16000:
        received += there.read(16000)
    assert received == DATA[:16000]
    return here.cipher()


def threads() -> Result:
    sums = [0.0] * 4

    def add(number: int) -> None:
        sums[number] = sum(math.sin(i * number) for i in range(20000))

    running = [threading.Thread(target=add, args=(n,)) for n in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    yield "sines", sums


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        parts = [mathematics(), long_doubles(), big_numbers(), data(), digests(), ciphers()]
        parts += [signatures(directory), tls(directory), threads()]
        for part in parts:
            for name, result in part:
                print(f"{name:32}", hashlib.sha256(repr(result).encode()).hexdigest()[:16], flush=True)
    print("workload done", sys.version.split()[0])


if __name__ == "__main__":
    main()
