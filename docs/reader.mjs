#!/usr/bin/env node
// A complete reader of protected files, with nothing but Node (20 or later):
//
//     node reader.mjs public.safetensors alice.grant out.safetensors [--signer signing.pub]
//
// It writes the checkpoint that the grant unlocks; or it prints one line that says why it cannot, with
// the reason (§ Failures) first. It follows FORMAT.md; "§" names a section of it.
import {
  createCipheriv, createDecipheriv, createHash, createPublicKey, hkdfSync, verify,
} from 'node:crypto';
import {
  closeSync, existsSync, fstatSync, openSync, readFileSync, readSync, renameSync, rmSync, writeSync,
} from 'node:fs';
import { endianness } from 'node:os';
import { parseArgs } from 'node:util';
import { inflateSync } from 'node:zlib';

// --- § Failures ----------------------------------------------------------------------------------

class Refused extends Error {
  constructor(message, reason) {
    super(message);
    this.reason = reason;
  }
}

const check = (passed, message, reason) => { if (!passed) throw new Refused(message, reason); };

// A refusal inside a step gets the step's reason, unless it has its own.
function step(reason, action) {
  try {
    return action();
  } catch (error) {
    if (error instanceof Refused) error.reason ??= reason;
    throw error;
  }
}

function* chunks(bytes) { // Node hashes, reads and writes less than 2 GiB in a call
  for (let i = 0; i < bytes.length; i += 2 ** 30) yield bytes.subarray(i, i + 2 ** 30);
}

function sha256(...parts) {
  const hash = createHash('sha256');
  for (const part of parts) {
    const bytes = typeof part === 'string' ? Buffer.from(part) : part;
    for (const chunk of chunks(bytes)) hash.update(chunk);
  }
  return hash.digest();
}

function u32(n) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(n);
  return bytes;
}

const u64 = (n) => Buffer.concat([u32(n % 2 ** 32), u32(Math.floor(n / 2 ** 32))]);
const product = (shape) => shape.reduce((a, b) => a * b, 1);
const same = (a, b) => a.length === b.length && a.every((x, i) => x === b[i]);
const isCount = (x) => Number.isSafeInteger(x) && x >= 0;
const isShape = (x) => Array.isArray(x) && x.every(isCount);
const isHex = (x, size) => typeof x === 'string' && x.length === 2 * size && !/[^0-9a-f]/.test(x);

// --- § Notation ----------------------------------------------------------------------------------

// Node would skip invalid base64, and accept several texts for the same bytes.
function unbase64(text, what) {
  const bytes = Buffer.from(text, 'base64');
  check(bytes.toString('base64') === text, `${what}: not base64`);
  return bytes;
}

function decode(bytes, what) {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new Refused(`${what}: not UTF-8`);
  }
}

// JSON.parse accepts duplicate keys and puts a key like "7" before all others, so it only checks the
// grammar here. Objects are Maps; a number that is not an integer, or has a sign, is NaN.
function parseJSON(text, what) {
  try {
    JSON.parse(text);
  } catch {
    throw new Refused(`${what}: not JSON`);
  }
  let at = 0;
  const peek = () => {
    while (' \t\n\r'.includes(text[at])) at++;
    return text[at];
  };
  const string = () => {
    const start = at++;
    while (text[at] !== '"') at += text[at] === '\\' ? 2 : 1;
    const value = JSON.parse(text.slice(start, ++at));
    check(value.isWellFormed(), `${what}: a lone surrogate`); // in UTF-8 it would be U+FFFD
    return value;
  };
  const items = (end, item) => { // in a list or an object
    at++;
    while (peek() !== end) {
      item();
      if (peek() === ',') at++;
    }
    at++;
  };
  const value = () => {
    if (peek() === '"') return string();
    if (text[at] === '[') {
      const list = [];
      items(']', () => list.push(value()));
      return list;
    }
    if (text[at] === '{') {
      const map = new Map();
      items('}', () => {
        const key = string();
        check(!map.has(key), `${what}: duplicate key ${key}`);
        peek(); // the colon
        at++;
        map.set(key, value());
      });
      return map;
    }
    const start = at;
    while (at < text.length && !',]} \t\n\r'.includes(text[at])) at++;
    const word = text.slice(start, at);
    if (word === 'null') return null;
    if (word === 'true' || word === 'false') return word === 'true';
    return /^(0|[1-9]\d*)$/.test(word) ? Number(word) : NaN;
  };
  return value();
}

// An object with exactly these fields.
function fields(map, names, what) {
  check(map instanceof Map && map.size === names.length && names.every((name) => map.has(name)),
    `${what}: not an object of ${names.join(', ')}`);
  return Object.fromEntries(map);
}

// --- § Grants and keys ---------------------------------------------------------------------------

// Not trim(), which strips more kinds of space than the format allows.
const strip = (line) => line.replace(/^[ \t\r]+|[ \t\r]+$/g, '');

function readKeyFile(path, kind, names) {
  const bytes = readFileSync(path);
  check(bytes.length <= 65536, `${path}: too long`, 'kind');
  const text = step('kind', () => decode(bytes, path));
  const lines = text.replace(/^\uFEFF/, '').split('\n').map(strip)
    .filter((line) => line && !line.startsWith('#'));
  check(!/^(age-encryption\.org\/|-----BEGIN AGE)/.test(lines[0]),
    `${path}: sealed with age: decrypt it with age first`, 'recipient');
  check(lines[0] === kind, `${path}: does not begin with ${kind}`, 'kind');
  const found = new Map();
  for (const line of lines.slice(1)) {
    const [, name, text] = line.match(/^([a-z-]+)[ \t\r]*:[ \t\r]*([^]*)$/) ?? [];
    check(name && !found.has(name), `${path}: a line that is not a field, or a duplicate field`);
    found.set(name, text);
  }
  check(!found.has('sealed'), `${path}: locked with a passphrase: write it without one first`,
    'passphrase');
  const order = names.filter((name) => name !== 'signer' || found.has(name));
  const { checksum, ...values } = fields(found, [...order, 'checksum'], path);
  const signed = [kind, ...order.map((name) => `${name}: ${values[name]}`)].join('\n');
  check(sha256('selcrypt/v1/file\0', signed).toString('hex', 0, 8) === checksum,
    `${path}: wrong checksum: there is a typing error`);
  const key = unbase64(values.key, path);
  check(key.length === 32, `${path}: the key is not 32 bytes`);
  return { ...values, key };
}

function readGrant(path) {
  const names = ['model-id', 'level', 'signer', 'key'];
  const { level, signer = null, key, ...rest } = readKeyFile(path, 'selcrypt-grant-v1', names);
  check(isHex(rest['model-id'], 16) && (signer === null || isHex(signer, 32))
    && /^[1-9]\d{0,2}$/.test(level) && Number(level) <= 256, `${path}: a wrong field`);
  return { modelId: rest['model-id'], level: Number(level), signer, key };
}

// --- § Reading, 1: the file, by safetensors' own rules -------------------------------------------

// Bits per element; for dtypes that can be encrypted (§ Cipher), also mantissa and sign bits.
const DTYPES = new Map(Object.entries({
  F64: [64, 52, 1], F32: [32, 23, 1], F16: [16, 10, 1], BF16: [16, 7, 1],
  F8_E4M3: [8, 3, 1], F8_E4M3FNUZ: [8, 3, 1], F8_E5M2: [8, 2, 1], F8_E5M2FNUZ: [8, 2, 1],
  F8_E8M0: [8, 0, 0],
  I64: [64, null], I32: [32, null], I16: [16, null], I8: [8, null],
  U64: [64, null], U32: [32, null], U16: [16, null], U8: [8, null],
  BOOL: [8], C64: [64], F4: [4], F6_E2M3: [6], F6_E3M2: [6],
}));

// The units that the seal masks in a tensor: halves of complex numbers, single bytes of codes.
const sealed = (dtype) =>
  DTYPES.get({ C64: 'F32', F4: 'U8', F6_E2M3: 'U8', F6_E3M2: 'U8' }[dtype] ?? dtype);
const CHUNK = 2 ** 22;

function readAt(file, position, length) {
  const bytes = Buffer.from(new ArrayBuffer(length)); // a separate buffer, so that typed arrays are aligned
  for (const chunk of chunks(bytes)) {
    for (let done = 0; done < chunk.length;) {
      const count = readSync(file, chunk, done, chunk.length - done, position);
      check(count > 0, 'the file shrank while it was read', 'file');
      done += count;
      position += count;
    }
  }
  return bytes;
}

function readHeader(file) {
  const { size } = fstatSync(file);
  check(size >= 8, 'not a safetensors file: too short');
  const first = readAt(file, 0, 8);
  const length = first.readUInt32LE(0) + 2 ** 32 * first.readUInt32LE(4);
  check(length <= 100_000_000 && 8 + length <= size, 'not a safetensors file, or cut off');
  const text = decode(readAt(file, 8, length), 'header');
  check(text[0] === '{', 'header: does not begin with {');
  const header = parseJSON(text, 'header');
  const metadata = header.has('__metadata__') ? header.get('__metadata__') : new Map();
  check(metadata instanceof Map && [...metadata.values()].every((text) => typeof text === 'string'),
    '__metadata__: not text for text');
  header.delete('__metadata__');

  const tensors = [...header].map(([name, entry]) => {
    const what = `tensor ${name}`;
    const { dtype, shape, data_offsets: offsets } =
      fields(entry, ['dtype', 'shape', 'data_offsets'], what);
    check(DTYPES.has(dtype) && isShape(shape) && isShape(offsets) && offsets.length === 2,
      `${what}: a wrong field`);
    const [bits] = DTYPES.get(dtype);
    check(shape.every((_, i) => isCount(bits * product(shape.slice(0, i + 1))))
      && bits * product(shape) === 8 * (offsets[1] - offsets[0]), `${what}: a wrong length`);
    return { name, dtype, shape, start: offsets[0], stop: offsets[1] };
  });
  let stop = 0;
  for (const tensor of tensors.toSorted((a, b) => a.start - b.start || a.stop - b.stop)) {
    check(tensor.start === stop, `tensor ${tensor.name}: a hole or an overlap before it`);
    stop = tensor.stop;
  }
  check(8 + length + stop === size, 'the data ends before or after the end of the file');
  return { metadata, tensors, start: 8 + length };
}

// --- § Reading, 2: § Manifest and § Metadata -----------------------------------------------------

function parseManifest(text) {
  const map = parseJSON(text, 'manifest');
  const format = map instanceof Map ? map.get('format') : undefined;
  check(!/^selcrypt-v(?!1$)\d+$/.test(format), `the file has the later format ${format}`,
    'version');
  const manifest = fields(map, ['format', 'model_id', 'cipher', 'rest', 'levels', 'metadata',
    'shard', 'signer', 'tensors'], 'manifest');
  const { model_id: modelId, rest, levels, metadata, shard, signer, tensors } = manifest;
  const cipher = fields(manifest.cipher, ['name', 'unit', 'permute', 'fine_bits'], 'cipher');
  check(format === 'selcrypt-v1' && isHex(modelId, 16)
    && (metadata === null || isHex(metadata, 32)) && (signer === null || isHex(signer, 32))
    && (shard === null || (isShape(shard) && shard.length === 2 && shard[0] >= 1
      && shard[0] <= shard[1]))
    && Array.isArray(levels) && levels.length >= 1 && levels.length <= 256
    && ['sealed', 'plain'].includes(rest) && tensors instanceof Map, 'manifest: a wrong field');
  check(cipher.name === 'lossless' && ['weight', 'group'].includes(cipher.unit)
    && typeof cipher.permute === 'boolean'
    && (cipher.fine_bits === null || isCount(cipher.fine_bits)), 'cipher: a wrong field');
  for (const level of levels) {
    const { groups, weights } = fields(level, ['groups', 'weights'], 'level');
    check(isCount(groups) && isCount(weights), 'level: a wrong field');
  }
  for (const [name, entry] of tensors) {
    const what = `manifest, tensor ${name}`;
    const tensor = fields(entry, ['dtype', 'shape', 'sha256', 'window'], what);
    const { dtype, shape, sha256, window } = tensor;
    check(DTYPES.has(dtype) && isShape(shape) && Array.isArray(sha256)
      && sha256.length === Math.ceil(DTYPES.get(dtype)[0] * product(shape) / 8 / CHUNK)
      && sha256.every((digest) => isHex(digest, 32)), `${what}: a wrong field`);
    const [width, mantissa, sign] = sealed(dtype);
    const hasWindow = rest === 'sealed' && typeof mantissa === 'number' && sha256.length > 0;
    check(hasWindow ? isShape(window) && window.length === 3 && window[2] <= sign
      && window[1] <= width - mantissa - sign
      && window[0] + 2 ** window[1] <= 2 ** (width - mantissa - sign) : window === null,
    `${what}: a wrong window`);
    tensors.set(name, tensor);
  }
  return { modelId, cipher, rest, levels: levels.map((level) => Object.fromEntries(level)), metadata,
    signer, tensors };
}

function readMetadata(metadata) {
  const text = metadata.get('selcrypt');
  check(text !== undefined, 'the file is not protected', 'unprotected');
  const manifest = step('manifest', () => parseManifest(text));
  const boxNames = manifest.levels.map((_, i) => `selcrypt.box.${i + 1}`);
  const ours = new Set(['selcrypt', ...boxNames]);
  if (manifest.signer !== null) ours.add('selcrypt.signature');
  for (const key of ours) check(metadata.has(key), `metadata: ${key} is missing`);
  const caller = [...metadata].filter(([key]) => !ours.has(key));
  for (const [key] of caller) check(!key.startsWith('selcrypt.'), `metadata: unknown ${key}`);

  const entries = caller.map((entry) => entry.map((text) => Buffer.from(text)))
    .sort(([a], [b]) => Buffer.compare(a, b)) // JavaScript's own order differs from UTF-8's
    .flatMap(([key, value]) => [u64(key.length), key, u64(value.length), value]);
  check(manifest.metadata === null ? caller.length === 0
    : sha256('selcrypt/v1/metadata\0', ...entries).toString('hex') === manifest.metadata,
  "the caller's metadata were changed");
  const boxes = boxNames.map((name) => metadata.get(name));
  const signature = metadata.get('selcrypt.signature');
  return { ...manifest, text, boxes, signature, caller };
}

// --- § Reading, 3 and 4: § Signature, and the table of tensors -----------------------------------

function checkSignature({ signer, text, boxes, signature }) {
  const x = Buffer.from(signer, 'hex').toString('base64url');
  const key = createPublicKey({ format: 'jwk', key: { kty: 'OKP', crv: 'Ed25519', x } });
  const digests = [text, ...boxes].map((part) => sha256(part));
  const message = Buffer.concat([Buffer.from('selcrypt/v1/signature\0'), ...digests]);
  check(verify(null, message, key, unbase64(signature, 'signature')),
    'the signature is not valid');
}

function checkTable(table, tensors) {
  check(tensors.length === table.size, 'there are more or fewer tensors than in the manifest');
  for (const { name, dtype, shape } of tensors) {
    const entry = table.get(name);
    check(entry?.dtype === dtype && same(entry.shape, shape), `tensor ${name}: does not match the manifest`);
  }
}

// --- § Reading, 5: § Keys and § Boxes ------------------------------------------------------------

const hkdf = (key, info) => Buffer.from(hkdfSync('sha256', key, '', `selcrypt/v1/${info}`, 32));

function openSeal(box, m, key, manifestText) {
  const what = `box ${m}`;
  const bytes = unbase64(box, what);
  check(bytes.length >= 12 + 16, `${what}: too short`);
  const nonce = bytes.subarray(0, 12);
  const aead = createDecipheriv('chacha20-poly1305', key, nonce, { authTagLength: 16 });
  aead.setAAD(Buffer.concat([Buffer.from('selcrypt/v1/box\0'), u32(m), sha256(manifestText)]));
  aead.setAuthTag(bytes.subarray(-16));
  const content = aead.update(bytes.subarray(12, -16));
  try {
    aead.final();
  } catch {
    throw new Refused(`${what}: does not open: the key is for another file, or the file was changed`);
  }
  return content;
}

// The rings of level m, each with its tensor and its mask.
function openBox(manifest, tensors, m, key) {
  const what = `box ${m}`;
  const content = step('box', () =>
    openSeal(manifest.boxes[m - 1], m, hkdf(key, 'seal'), manifest.text));
  const length = content.length >= 4 ? content.readUInt32LE() : Infinity;
  check(4 + length <= content.length, `${what}: cut off`);
  let at = 4 + length;
  const table = parseJSON(decode(content.subarray(4, at), what), what);
  const { rings } = fields(table, ['rings'], what);
  check(Array.isArray(rings), `${what}: not a list of rings`);
  const sum = { groups: 0, weights: 0 };
  const names = new Set();
  const opened = rings.map((entry) => {
    const ring = fields(entry, ['tensor', 'mask_shape', 'groups', 'coding', 'bytes',
      'sha256'], what);
    const { mask_shape: maskShape, groups } = ring;
    const tensor = tensors.get(ring.tensor);
    check(tensor && !names.has(ring.tensor), `${what}: an unknown or duplicate tensor`);
    names.add(ring.tensor);
    const [bits, mantissa] = DTYPES.get(tensor.dtype);
    const elements = product(tensor.shape);
    check(mantissa !== undefined && (manifest.cipher.fine_bits ?? 0) <= (mantissa ?? bits)
      && elements > 0 && tensor.shape.length <= 63
      && isShape(maskShape) && maskShape.length === tensor.shape.length
      && maskShape.every((n, axis) => n === 1 || n === tensor.shape[axis])
      && isCount(groups) && groups >= 1 && isCount(ring.bytes) && isHex(ring.sha256, 32)
      && ['gaps', 'bitmap'].includes(ring.coding) && at + ring.bytes <= content.length, `${what}, tensor ${ring.tensor}: a wrong field`);
    const size = elements / product(maskShape); // per group
    tensor.left -= groups * size;
    check(tensor.left >= 0, `${what}, tensor ${ring.tensor}: rings overlap`);
    const positions = content.subarray(at, at + ring.bytes);
    const mask = (ring.coding === 'gaps' ? readGaps : readBitmap)(
      positions, product(maskShape), groups, `${what}, tensor ${ring.tensor}`);
    at += ring.bytes;
    sum.groups += groups;
    sum.weights += groups * size;
    return { tensor, maskShape, mask, groups, size, sha256: ring.sha256 };
  });
  const expected = manifest.levels[m - 1];
  check(at === content.length && sum.groups === expected.groups && sum.weights === expected.weights,
    `${what}: does not match the counts in the manifest`);
  return opened;
}

// The content of one zlib stream, if it is within the limit and nothing follows it (Node ignores
// trailing bytes); otherwise nothing.
function inflate(packed, most) {
  try {
    const { buffer, engine } = inflateSync(packed, { maxOutputLength: most, info: true });
    if (engine.bytesWritten === packed.length) return buffer;
  } catch { /* also a stream that is longer */ }
  return new Uint8Array();
}

// Both return a mask with one bit per element, the first in the highest bit of the first byte.
function readGaps(packed, bits, groups, what) {
  const gaps = inflate(packed, Math.max(groups + Math.floor((bits - groups) / 255), 1));
  const mask = new Uint8Array(Math.ceil(bits / 8));
  let next = 0;
  let count = 0;
  for (const gap of gaps) {
    next += gap;
    if (gap === 255) continue;
    check(next < bits, `${what}: a wrong gap`);
    mask[next >> 3] |= 128 >> (next & 7);
    next++;
    count++;
  }
  check(count === groups && gaps.at(-1) !== 255, `${what}: wrong gaps`);
  return mask;
}

function readBitmap(packed, bits, groups, what) {
  const length = Math.ceil(bits / 8);
  check(8 * groups >= bits, `${what}: a bitmap with too few groups`);
  const mask = inflate(packed, length);
  let count = 0;
  for (const byte of mask) for (let rest = byte; rest; rest &= rest - 1) count++;
  check(mask.length === length && count === groups && !((mask.at(-1) << (bits % 8 || 8)) & 255),
    `${what}: a wrong bitmap`);
  return mask;
}

// --- § Reading, 6: § Boxes, the ring's weights, and § Cipher -------------------------------------

// The positions of a ring's weights in the tensor, in the order of the ring.
function positions({ tensor, maskShape, mask, groups, size }, byGroup, taken) {
  let groupOf = Uint32Array.of(0); // for each element, grown axis by axis
  tensor.shape.forEach((n, axis) => {
    const step = maskShape[axis] === 1 ? 0 : 1;
    const grown = new Uint32Array(groupOf.length * n);
    for (let i = 0, to = 0; i < groupOf.length; i++) {
      const first = groupOf[i] * maskShape[axis];
      for (let j = 0; j < n; j++) grown[to++] = first + j * step;
    }
    groupOf = grown;
  });
  const isIn = (group) => mask[group >> 3] & (128 >> (group & 7));
  const next = new Uint32Array(byGroup ? product(maskShape) : 0); // position of a group's next weight
  for (let group = 0, place = 0; group < next.length; group++) {
    next[group] = place;
    if (isIn(group)) place += size;
  }
  const found = new Uint32Array(groups * size);
  for (let i = 0, place = 0; i < groupOf.length; i++) {
    if (!isIn(groupOf[i])) continue;
    check(!taken[i], `tensor ${tensor.name}: its rings overlap`, 'ring');
    taken[i] = 1;
    found[byGroup ? next[groupOf[i]]++ : place++] = i;
  }
  return found;
}

// A separate array: a Buffer may be part of a larger one, at an unaligned offset.
function stream(key, domain, counter, length) {
  const iv = Buffer.concat([u32(counter), Buffer.from(domain.padEnd(12, '\0'))]);
  return new Uint8Array(createCipheriv('chacha20', key, iv).update(Buffer.alloc(length)));
}
const fold = (key, n) => stream(key, 'fold_in', n, 32);
const bits = (key, length, block = 0) => stream(key, 'random_bits', block, length).buffer;

function leafKey(key, name) {
  const leaf = sha256('selcrypt/v1/leaf\0', name);
  for (let i = 0; i < 32; i += 4) key = fold(key, leaf.readUInt32LE(i));
  return key;
}

// § Seal: removes it in place.
function unseal({ name, dtype }, window, cipherKey, bytes) {
  const [width, mantissa, sign] = dtype === 'BOOL' ? [8] : sealed(dtype);
  const Words = { 8: Uint8Array, 16: Uint16Array }[width] ?? Uint32Array;
  let count = dtype === 'BOOL' ? 1 : window === null ? width : mantissa + window[1];
  const mask = []; // as 32-bit words, the lowest first, or one narrower word
  for (let left = width; left > 0; left -= 32, count = Math.max(count - 32, 0)) {
    mask.push(2 ** Math.min(count, 32) - 1);
  }
  if (sign && window?.[2]) mask[mask.length - 1] += 2 ** ((width - 1) % 32);
  const offset = window === null ? 0 : window[0] * 2 ** (mantissa % 32); // of the highest word
  const data = new Words(bytes.buffer);
  const r = new Words(bits(fold(leafKey(cipherKey, name), 2), bytes.length));
  const last = mask.length - 1;
  for (let i = 0; i < data.length; i++) {
    const part = i % mask.length;
    const o = part === last ? offset : 0;
    data[i] = ((data[i] - o) ^ (r[i] & mask[part])) + o;
  }
}

// F for a dtype, as 32-bit words, the lowest first, or one narrower word.
function fineBits({ permute, fine_bits: fine }, [width, mantissa, sign]) {
  const all = mantissa ?? width;
  let count = fine ?? (!permute ? all : mantissa === null ? 0 : Math.max(mantissa - 3, 0));
  const words = [];
  for (let left = width; left > 0; left -= 32, count = Math.max(count - 32, 0)) {
    words.push(2 ** Math.min(count, 32) - 1);
  }
  if (fine === null && !permute && sign) words[words.length - 1] += 2 ** ((width - 1) % 32);
  return words;
}

// π⁻¹ of the units of a ring.
function unpermute(c, units, key) {
  const x = new c.constructor(c.length);
  const size = c.length / units;
  const blocks = Math.ceil(units / 4096);
  for (let r = 0; r < blocks; r++) {
    const count = Math.ceil((units - r) / blocks);
    // Twenty random bits, with the unit's number in the other bits: ties stay in order.
    const order = new Uint32Array(bits(key, 4 * count, 256 * r))
      .map((word, j) => (word & 0xfffff000) | j).sort();
    for (let j = 0; j < count; j++) {
      const from = (r + j * blocks) * size;
      const to = (r + (order[j] & 4095) * blocks) * size;
      for (let i = 0; i < size; i++) x[to + i] = c[from + i];
    }
  }
  return x;
}

// Decrypts a ring in place. A 64-bit weight is handled as two 32-bit words, to avoid BigInt.
function decryptRing(ring, at, cipher, cipherKey, bytes) {
  const { name, dtype } = ring.tensor;
  const fine = fineBits(cipher, DTYPES.get(dtype));
  const Words = { 8: Uint8Array, 16: Uint16Array }[DTYPES.get(dtype)[0]] ?? Uint32Array;
  const lanes = fine.length; // words per weight
  const data = new Words(bytes.buffer);
  const byGroup = cipher.unit === 'group';
  const key = leafKey(cipherKey, name);
  let x = new Words(at.length * lanes);
  for (let i = 0; i < x.length; i++) x[i] = data[at[Math.floor(i / lanes)] * lanes + i % lanes];
  const k = new Words(bits(fold(key, 1), x.byteLength));
  for (let i = 0; i < x.length; i++) x[i] ^= k[i] & fine[i % lanes];
  if (cipher.permute) x = unpermute(x, byGroup ? ring.groups : at.length, fold(key, 0));
  check(sha256('selcrypt/v1/ring\0', Buffer.from(x.buffer)).toString('hex') === ring.sha256,
    `tensor ${name}: the decrypted weights are not those that were encrypted`, 'plaintext');
  for (let i = 0; i < x.length; i++) data[at[Math.floor(i / lanes)] * lanes + i % lanes] = x[i];
}

// --- § Unlocking ---------------------------------------------------------------------------------

function write(path, manifest, level, tensors, contents) {
  const caller = new Map(manifest.caller);
  const levels = manifest.levels.length;
  if (level < levels && manifest.metadata !== null) {
    caller.set('selcrypt-unlocked', JSON.stringify({ model_id: manifest.modelId, level, levels }));
  }
  const json = (pairs) => // not from an object, which would put keys like "7" first
    `{${pairs.map(([key, text]) => `${JSON.stringify(key)}:${text}`).join()}}`;
  const own = json([...caller].map(([key, text]) => [key, JSON.stringify(text)]));
  const entries = manifest.metadata === null && !caller.size ? [] : [['__metadata__', own]];
  let start = 0;
  for (const { name, dtype, shape, start: from, stop } of tensors) {
    const offsets = [start, start += stop - from];
    entries.push([name, JSON.stringify({ dtype, shape, data_offsets: offsets })]);
  }
  const text = Buffer.from(json(entries));
  const padding = Buffer.alloc(-text.length & 7, ' ');
  const head = [u64(text.length + padding.length), text, padding];

  const unfinished = `${path}.unfinished`;
  const file = openSync(unfinished, 'wx');
  try {
    for (const bytes of [...head, ...contents]) {
      for (const chunk of chunks(bytes)) {
        for (let done = 0; done < chunk.length;) done += writeSync(file, chunk, done);
      }
    }
    closeSync(file);
    renameSync(unfinished, path);
  } catch (error) {
    rmSync(unfinished, { force: true });
    throw error;
  }
}

function main() {
  const options = { signer: { type: 'string' } };
  const { values, positionals } = parseArgs({ allowPositionals: true, options });
  check(positionals.length === 3, 'usage: node reader.mjs FILE GRANT OUTPUT [--signer VERIFY_KEY]');
  const [path, grantPath, output] = positionals;
  check(endianness() === 'LE', 'this needs a little-endian machine');
  check(!existsSync(output), `${output}: already exists`);
  const grant = step('damaged', () => readGrant(grantPath));
  const signers = grant.signer === null ? [] : [grant.signer];
  if (values.signer !== undefined) {
    const { key } = step('damaged', () =>
      readKeyFile(values.signer, 'selcrypt-verify-key-v1', ['key']));
    signers.push(key.toString('hex'));
  }

  const file = openSync(path);
  const { metadata, tensors, start } = step('file', () => readHeader(file)); // § Reading, 1
  const manifest = step('metadata', () => readMetadata(metadata)); // 2
  check(signers.every((signer) => signer === manifest.signer), // 3
    'the file is not from the expected signer, or was altered', 'signer');
  if (manifest.signer !== null) step('signature', () => checkSignature(manifest));
  step('table', () => checkTable(manifest.tensors, tensors)); // 4
  check(grant.modelId === manifest.modelId, 'the grant is for another file', 'model'); // 5
  check(grant.level <= manifest.levels.length, 'the grant is for a level that does not exist',
    'level');
  const byName = new Map(tensors.map((tensor) => [tensor.name,
    { ...tensor, rings: [], left: product(tensor.shape) }]));
  const keys = [grant.key]; // from the grant's level downwards
  while (keys.length < grant.level) keys.push(hkdf(keys.at(-1), 'down'));
  keys.reverse().forEach((key, i) => {
    for (const ring of step('ring', () => openBox(manifest, byName, i + 1, key))) {
      ring.tensor.rings.push([ring, hkdf(key, 'cipher')]);
    }
  });
  const contents = [...byName.values()].map((tensor) => { // 6
    const bytes = readAt(file, start + tensor.start, tensor.stop - tensor.start);
    const { sha256: digests, window } = manifest.tensors.get(tensor.name);
    digests.forEach((digest, i) => {
      const chunk = bytes.subarray(i * CHUNK, (i + 1) * CHUNK);
      check(sha256(chunk).toString('hex') === digest, `tensor ${tensor.name}: was changed`,
        'digest');
    });
    if (manifest.rest === 'sealed') unseal(tensor, window, hkdf(keys[0], 'cipher'), bytes);
    const taken = new Uint8Array(tensor.rings.length ? product(tensor.shape) : 0);
    const byGroup = manifest.cipher.unit === 'group';
    for (const [ring, key] of tensor.rings) {
      decryptRing(ring, positions(ring, byGroup, taken), manifest.cipher, key, bytes);
    }
    return bytes;
  });
  write(output, manifest, grant.level, tensors, contents);
}

try {
  main();
} catch (error) {
  // One line; a name from a file must not control the terminal.
  const message = error.message.slice(0, 300).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]+/gu, ' ');
  console.error(`reader.mjs: ${error.reason ? `${error.reason}: ` : ''}${message}`);
  process.exitCode = 1;
}
