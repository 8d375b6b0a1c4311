// What workload.py is for Python, for a just-in-time compiler: V8, its regular expressions and WebAssembly.
"use strict";
const { createHash, createCipheriv } = require("crypto");
const { deflateSync, brotliCompressSync } = require("zlib");

let seed = 7;
const random = () => (seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0) / 2 ** 32;
const tell = (name, value) =>
  console.log(name.padEnd(32), createHash("sha256").update(JSON.stringify(value)).digest("hex").slice(0, 16));

const bodies = Array.from({ length: 5 }, () => ({ x: random(), y: random(), vx: random(), vy: random(), m: random() }));
for (let step = 0; step < 40000; step++) {
  for (const p of bodies)
    for (const q of bodies) {
      const dx = q.x - p.x, dy = q.y - p.y, d = dx * dx + dy * dy + 0.01;
      const pull = (0.001 * q.m) / (d * Math.sqrt(d));
      p.vx += dx * pull;
      p.vy += dy * pull;
    }
  for (const p of bodies) {
    p.x += p.vx * 0.001;
    p.y += p.vy * 0.001;
  }
}
tell("objects", bodies);

const floats = new Float64Array(1 << 14).map(random);
for (let round = 0; round < 60; round++)
  for (let i = 0; i < floats.length; i++) floats[i] = Math.sin(floats[i]) * 1.5 + floats[(i * 7) & 16383] / 3;
tell("typed array", [...floats]);

const map = new Map();
for (let i = 0; i < 200000; i++) map.set(`k${(Math.imul(i, 2654435761) >>> 0) % 50000}`, i);
tell("map", [...map]);

let big = 0n;
for (let i = 1n; i < 600n; i++) big = big * i + i ** 40n;
tell("big integers", big.toString());

const letters = Array.from({ length: 30000 }, (_, i) => String.fromCharCode(97 + ((i * 7) % 26))).join("");
tell("regular expressions", letters.replace(/([aeiou])(.)/g, "$2$1").match(/[a-z]{5}q/g));
tell("cipher", createCipheriv("aes-256-gcm", Buffer.alloc(32, 1), Buffer.alloc(12, 2)).update(letters, "utf8", "hex"));
tell("compression", [deflateSync(letters).toString("hex"), brotliCompressSync(Buffer.from(letters)).toString("hex")]);

// (func (export "add") (param i32 i32) (result i32) local.get 0 local.get 1 i32.add)
const add = new WebAssembly.Instance(new WebAssembly.Module(Buffer.from(
  "0061736d0100000001070160027f7f017f030201000707010361646400000a09010700200020016a0b", "hex"))).exports.add;
let sum = 0;
for (let i = 0; i < 300000; i++) sum = add(sum, i);
tell("web assembly", sum);

tell("sort", Array.from({ length: 100000 }, () => (random() * 1e6) | 0).sort((a, b) => a - b));

class Single { constructor(x) { this.x = x; } value() { return this.x; } }
class Double extends Single { value() { return super.value() * 2; } }
let total = 0;
for (let i = 0; i < 2e6; i++) total += (i % 3 ? new Single(i) : new Double(i)).value();
tell("classes", total);
console.log("script done", process.version);
