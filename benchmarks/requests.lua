-- What wrk sends: OPERATION is read, list, create, update or mixed, HEROES the number of rows.
local heroes = tonumber(os.getenv("HEROES"))
local json = { ["Content-Type"] = "application/json" }
local operations = {}

function operations.read()
  return wrk.format("GET", "/heroes/" .. math.random(heroes))
end

function operations.list()
  return wrk.format("GET", "/heroes/?offset=" .. math.random(0, 900) .. "&limit=100")
end

function operations.create()
  local n = math.random(heroes)
  local body = '{"name":"Hero ' .. n .. '","age":' .. n % 100 .. ',"secret_name":"Secret"}'
  return wrk.format("POST", "/heroes/", json, body)
end

function operations.update()
  local body = '{"age":' .. math.random(0, 99) .. "}"
  return wrk.format("PATCH", "/heroes/" .. math.random(heroes), json, body)
end

-- 80% reads, 15% lists, 5% writes.
function operations.mixed()
  local n = math.random(200)
  local name = n <= 160 and "read" or n <= 190 and "list" or n <= 195 and "create" or "update"
  return operations[name]()
end

request = operations[os.getenv("OPERATION")]

local threads = 0
function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init()
  math.randomseed(os.time() + number)
end

function done(summary, latency)
  io.write(string.format(
    '{"requests": %d, "seconds": %f, "errors": %d, "p50": %f, "p95": %f, "p99": %f}\n',
    summary.requests, summary.duration / 1e6,
    summary.errors.status + summary.errors.connect + summary.errors.read
      + summary.errors.write + summary.errors.timeout,
    latency:percentile(50) / 1000, latency:percentile(95) / 1000, latency:percentile(99) / 1000))
end
