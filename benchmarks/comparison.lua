-- What wrk sends: OPERATION is read or create, IDS a file with one id a line.
local path, body = os.getenv("COLLECTION"), os.getenv("BODY")
local headers = { ["Content-Type"] = "application/json", ["Authorization"] = os.getenv("TOKEN") }
local ids = {}
local threads = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init()
  math.randomseed(os.time() + number)
  for id in io.lines(os.getenv("IDS")) do
    ids[#ids + 1] = id
  end
end

function request()
  if os.getenv("OPERATION") == "read" then
    return wrk.format("GET", path .. ids[math.random(#ids)], headers)
  end
  return wrk.format("POST", path, headers, body)
end

-- Successful responses per second.
function done(summary)
  io.write(string.format("%f\n", (summary.requests - summary.errors.status) / summary.duration * 1e6))
end
