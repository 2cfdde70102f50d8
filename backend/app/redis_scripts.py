"""The queue's changes of state in Redis, each one Lua script: it happens wholly, once, and as if nothing else happened meanwhile."""

from __future__ import annotations

PREFIX = "deephair:"

# KEYS[1] is the job's hash; the other keys have fixed names below PREFIX. Times come from the caller, in seconds since 1970.
_HEAD = f"""
local P = '{PREFIX}'
local job = KEYS[1]
local function files(id, keep)
  for _, name in ipairs(redis.call('SMEMBERS', P .. 'files:' .. id)) do
    if not keep[name] then
      redis.call('DEL', P .. 'file:' .. id .. ':' .. name)
      redis.call('SREM', P .. 'files:' .. id, name)
    end
  end
end
local function mine(owner, attempts)
  local now = redis.call('HMGET', job, 'state', 'owner', 'attempts')
  return now[1] == 'running' and now[2] == owner and now[3] == attempts
end
"""
_BODIES = {
    # id, capacity, options, now, names... -> 1, or 0 when the queue is full
    "add": """
local id = ARGV[1]
if redis.call('EXISTS', job) == 1 then return 1 end
if redis.call('ZCARD', P .. 'queued') >= tonumber(ARGV[2]) then return 0 end
local seq = redis.call('INCR', P .. 'seq')
redis.call('HSET', job, 'seq', seq, 'id', id, 'state', 'queued', 'options', ARGV[3], 'created', ARGV[4], 'attempts', 0, 'erased', 0)
for i = 5, #ARGV do
  redis.call('SADD', P .. 'files:' .. id, ARGV[i])
  redis.call('PERSIST', P .. 'file:' .. id .. ':' .. ARGV[i])
end
redis.call('ZADD', P .. 'queued', seq, id)
return 1
""",
    # owner, now -> id or nothing
    "claim": """
local first = redis.call('ZPOPMIN', P .. 'queued')
if #first == 0 then return false end
local key = P .. 'job:' .. first[1]
redis.call('HSET', key, 'state', 'running', 'owner', ARGV[1], 'started', ARGV[2])
redis.call('HINCRBY', key, 'attempts', 1)
redis.call('ZADD', P .. 'running', first[2], first[1])
return first[1]
""",
    # id, owner, attempts, how many attempts it takes back
    "release": """
if not mine(ARGV[2], ARGV[3]) then return 0 end
redis.call('HSET', job, 'state', 'queued')
redis.call('HDEL', job, 'owner', 'started', 'progress')
redis.call('HINCRBY', job, 'attempts', 0 - tonumber(ARGV[4]))
redis.call('ZREM', P .. 'running', ARGV[1])
redis.call('ZADD', P .. 'queued', redis.call('HGET', job, 'seq'), ARGV[1])
return 1
""",
    # owner, attempts, progress
    "note": """
if mine(ARGV[1], ARGV[2]) then redis.call('HSET', job, 'progress', ARGV[3]) end
""",
    # id, owner, attempts, state, now, field, value, suffix of the results' waiting names, names of the results...
    "finish": """
local id, suffix = ARGV[1], ARGV[8]
if not mine(ARGV[2], ARGV[3]) then
  for i = 9, #ARGV do redis.call('DEL', P .. 'file:' .. id .. ':' .. ARGV[i] .. suffix) end
  return 0
end
redis.call('HSET', job, 'state', ARGV[4], 'ended', ARGV[5], ARGV[6], ARGV[7])
redis.call('HDEL', job, 'progress')
local keep = {}
for i = 9, #ARGV do
  local name = P .. 'file:' .. id .. ':' .. ARGV[i]
  redis.call('RENAME', name .. suffix, name)
  redis.call('PERSIST', name)
  redis.call('SADD', P .. 'files:' .. id, ARGV[i])
  keep[ARGV[i]] = true
end
files(id, keep)
redis.call('ZREM', P .. 'running', id)
redis.call('ZADD', P .. 'ended', ARGV[5], id)
return 1
""",
    # id, now -> the state it was in, or nothing
    "erase": """
local id, state = ARGV[1], redis.call('HGET', job, 'state')
if not state then return false end
if state == 'queued' or state == 'running' then
  redis.call('HSET', job, 'state', 'cancelled', 'ended', ARGV[2])
  redis.call('ZREM', P .. 'queued', id)
  redis.call('ZREM', P .. 'running', id)
  redis.call('ZADD', P .. 'ended', ARGV[2], id)
end
redis.call('HSET', job, 'options', '{}', 'erased', 1)
redis.call('HDEL', job, 'result', 'progress')
files(id, {})
return state
""",
    # id -> 1 where it was still there
    "forget": """
if redis.call('ZREM', P .. 'ended', ARGV[1]) == 0 then return 0 end
files(ARGV[1], {})
redis.call('DEL', job, P .. 'files:' .. ARGV[1])
return 1
""",
}

SCRIPTS = {name: _HEAD + body for name, body in _BODIES.items()}
