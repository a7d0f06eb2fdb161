// A forward protocol server for tests, on the Fluentd project's own library. It
// listens on 127.0.0.1, prints {"port": n} and then one line of JSON for every
// event that it has received, and ends when its standard input is closed.
//
//   node server.js [--port N] [--shared-key KEY [--user NAME --password PASSWORD]]
"use strict";

const { EventTime, FluentServer } = require("@fluent-org/logger");

function option(name) {
  const i = process.argv.indexOf("--" + name);
  return i < 0 ? undefined : process.argv[i + 1];
}

const key = option("shared-key");
const user = option("user");
const server = new FluentServer({
  listenOptions: { port: Number(option("port") || 0), host: "127.0.0.1" },
  security: key && { serverHostname: "peer", sharedKey: key, authorize: Boolean(user), userDict: user ? { [user]: option("password") } : {} },
});

server.on("entry", (tag, time, record) => {
  const exact = time instanceof EventTime;
  const line = { tag, seconds: exact ? time.epoch : time, nanos: exact ? time.nano : 0, record };
  // Numbers that msgpack wrote in 64 bits arrive as BigInt.
  process.stdout.write(JSON.stringify(line, (_, v) => (typeof v === "bigint" ? Number(v) : v)) + "\n");
});

process.stdin.on("end", () => process.exit(0));
process.stdin.resume();

server.listen().then(
  () => process.stdout.write(JSON.stringify({ port: server.port }) + "\n"),
  (err) => {
    process.stderr.write(String(err) + "\n");
    process.exit(1);
  },
);
