-- What wrk sends: OPERATION is read or create, IDS a file with one id a line.
dofile("requests.lua")  -- For the random numbers of the threads.

local path, body = os.getenv("COLLECTION"), os.getenv("BODY")
local headers = { ["Content-Type"] = "application/json", ["Authorization"] = os.getenv("TOKEN") }
local ids = {}
local seed = init

function init()
  seed()
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
