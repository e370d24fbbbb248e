"""What Redis runs as one command: each script with its KEYS and ARGV."""

from __future__ import annotations

import hashlib


class Script:
    """What Redis runs as one command, and the name it knows it by once it has seen it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# KEYS: clock, tags...  ARGV: an epoch, should there be none.
_CLOCK = """
local clock = redis.call('GET', KEYS[1])
if not clock then
    clock = ARGV[1] .. ' 0'
    redis.call('SET', KEYS[1], clock)
end
local epoch, now = string.match(clock, '(%S+) (%d+)')
"""

# What scripts that look at tags have in common. A tag's value is its stamp, and ` token=deadline` for each mark.
_TAGS = f"""{_CLOCK}
local time = redis.call('TIME')
local milliseconds = time[1] * 1000 + math.floor(time[2] / 1000)
local microseconds = time[1] * 1000000 + time[2]

local function marks_of(value, settled)
    local open, over = '', false
    for token, deadline in string.gmatch(value or '', ' (%x+)=(%d+)') do
        if token ~= settled and tonumber(deadline) > milliseconds then
            open = open .. ' ' .. token .. '=' .. deadline
        else
            over = true
        end
    end
    return open, over
end

local function move()
    now = string.format('%.0f', now + 1)
    clock = epoch .. ' ' .. now
    redis.call('SET', KEYS[1], clock)
end

-- Where the user may use no channels, nobody can listen to one either.
local function tell(told)
    redis.pcall('PUBLISH', KEYS[#KEYS], cmsgpack.pack({{told, microseconds}}))
end
"""

# KEYS: clock, tags..., the last writes, a channel. Returns the clock and the tags' stamps.
# A tag whose stamp was evicted gets the present one: entries that hold an older stamp stay invalid, and one that
# holds this very stamp is right, since no write came after it. So does a tag whose stamp is ahead of the clock:
# it is of an earlier epoch, and no fill could be older than it. A mark that has run out is a write that nobody has
# said the end of: it may have become visible at any moment until now, so the tag is stamped anew. No entry holds the
# stamp it had, and nobody need hear of the tag.
VERSIONS = Script(f"""{_TAGS}
local answer, over = {{}}, {{}}
for i = 2, #KEYS - 2 do
    local value = redis.call('GET', KEYS[i])
    local open, expired = marks_of(value)
    local stamp = string.match(value or '', '^%d+')
    if open ~= '' then
        stamp = 'pending'
    elseif expired then
        over[#over + 1] = i
    elseif not stamp or tonumber(stamp) > tonumber(now) then
        stamp = now
        redis.call('SET', KEYS[i], stamp)
    end
    answer[i] = stamp
end
if #over > 0 then
    move()
    for _, i in ipairs(over) do
        redis.call('SET', KEYS[i], now)
        answer[i] = now
    end
    tell({{clock}})
end
answer[1] = clock
return answer
""")

#: How many writes are remembered.
_MOST_WRITES = 1000

# KEYS: clock, tags..., the last writes, a channel.  ARGV: an epoch, a mark's token if any, milliseconds for which it is
# pending: 0 where it is settled, and who writes. Returns the clock. Who listens is not told of the tags once more when
# they are settled, but of those that had lost the mark: what was read before the commit was found valid meanwhile. And
# then nothing new is to be remembered. No write fails since it cannot be.
STAMP = Script(f"""{_TAGS}
move()
local told, token, pending = {{clock}}, ARGV[2], tonumber(ARGV[3])
local is_new = token == '' or pending > 0
for i = 2, #KEYS - 2 do
    local value = redis.call('GET', KEYS[i])
    local marks = marks_of(value, token)
    if pending > 0 then
        marks = marks .. ' ' .. token .. '=' .. string.format('%.0f', milliseconds + pending)
    end
    redis.call('SET', KEYS[i], now .. marks)
    if is_new or not string.find(value or '', ' ' .. token .. '=', 1, true) then
        told[#told + 1] = KEYS[i]
    end
end
if is_new then
    redis.pcall('LPUSH', KEYS[#KEYS - 1], cmsgpack.pack({{told, milliseconds, ARGV[4]}}))
    redis.pcall('LTRIM', KEYS[#KEYS - 1], 0, {_MOST_WRITES - 1})
end
tell(told)
return clock
""")

# KEYS: the last writes. Returns the milliseconds by now, and these, newest first.
HISTORY = """
local time = redis.call('TIME')
return {time[1] * 1000 + math.floor(time[2] / 1000), redis.call('LRANGE', KEYS[1], 0, -1)}
"""

# KEYS: clock, history, channel.  ARGV: an epoch, should the history be another one: that of a server which restarted,
# or of another one that has its place by now. Either may have forgotten the last writes.
SAME_HISTORY = """
local history = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
    .. string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
if redis.call('GET', KEYS[2]) ~= history then
    local clock = ARGV[1] .. ' 0'
    redis.call('SET', KEYS[1], clock)
    redis.call('SET', KEYS[2], history)
    redis.pcall('PUBLISH', KEYS[3], cmsgpack.pack({{clock}, 0}))
end
"""

# KEYS: clock, channel.  ARGV: an epoch.
CLEAR = """
local clock = ARGV[1] .. ' 0'
redis.call('SET', KEYS[1], clock)
redis.pcall('PUBLISH', KEYS[2], cmsgpack.pack({{clock}, 0}))
"""

# KEYS: leases...  ARGV: milliseconds, the token of each.
RENEW = """
for i = 1, #KEYS do
    if redis.call('GET', KEYS[i]) == ARGV[i + 1] then
        redis.call('PEXPIRE', KEYS[i], ARGV[1])
    end
end
"""

# KEYS: a lease.  ARGV: its token, milliseconds, and what it is to say for so long, if anything.
RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
    if ARGV[3] == '' then
        redis.call('DEL', KEYS[1])
    else
        redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
    end
end
"""

# KEYS: what is off.  ARGV: a name, and whether it is to be off. Returns what is off now.
SWITCH = """
local names = {}
for name in string.gmatch(redis.call('GET', KEYS[1]) or '', '[^\\n]+') do
    if name ~= ARGV[1] then names[#names + 1] = name end
end
if ARGV[2] == '1' then names[#names + 1] = ARGV[1] end
local text = table.concat(names, '\\n')
if text == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], text) end
return text
"""

# KEYS: the counts.  ARGV: seconds they are kept, then name and number of each.
ADD = """
for i = 2, #ARGV, 2 do
    redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""
