-- What wrk sends: OPERATION is read, list, create or update, HEROES the number of rows.
local operation = os.getenv("OPERATION")
local heroes = tonumber(os.getenv("HEROES"))
local json = { ["Content-Type"] = "application/json" }

local threads = 0
function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init()
  math.randomseed(os.time() + number)
end

function request()
  local id = math.random(heroes)
  if operation == "read" then
    return wrk.format("GET", "/heroes/" .. id)
  elseif operation == "list" then
    return wrk.format("GET", "/heroes/?offset=" .. math.random(0, 900) .. "&limit=100")
  elseif operation == "create" then
    local body = '{"name":"Hero ' .. id .. '","age":' .. id % 100 .. ',"secret_name":"Secret"}'
    return wrk.format("POST", "/heroes/", json, body)
  elseif operation == "update" then
    return wrk.format("PATCH", "/heroes/" .. id, json, '{"age":' .. math.random(0, 99) .. "}")
  end
end


function done(summary, latency)
  io.write(string.format(
    '{"requests": %d, "seconds": %f, "errors": %d, "p50": %f, "p99": %f}\n',
    summary.requests, summary.duration / 1e6,
    summary.errors.status + summary.errors.connect + summary.errors.read
      + summary.errors.write + summary.errors.timeout,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
