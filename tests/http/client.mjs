// A Node client for tests: node client.mjs PROXY_PORT URL CA MODE. Prints JSON: what it got over one kept connection.
// MODE "forward" sends the absolute target, "connect" tunnels with CONNECT.
import http from "node:http";
import https from "node:https";
import tls from "node:tls";
import { readFileSync } from "node:fs";

const [port, url, ca, mode] = process.argv.slice(2);
const target = new URL(url);
const trust = ca ? readFileSync(ca) : undefined;
const targetPort = target.port || (target.protocol === "https:" ? 443 : 80);

function connect() {
  return new Promise((resolve, reject) => {
    const request = http.request({ host: "127.0.0.1", port, method: "CONNECT", path: `${target.hostname}:${targetPort}` });
    request.on("connect", (response, socket) => {
      if (response.statusCode !== 200) return reject(new Error(`CONNECT: ${response.statusCode}`));
      if (target.protocol !== "https:") return resolve(socket);
      const secure = tls.connect({ socket, servername: target.hostname, ca: trust, ALPNProtocols: ["http/1.1"] }, () => resolve(secure));
      secure.on("error", reject);
    });
    request.on("error", reject).end();
  });
}

let agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
if (mode === "connect") {
  const socket = await connect();
  agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  agent.createConnection = () => socket;
}

function send(method, path, body) {
  const options = mode === "connect"
    ? { method, path, headers: { Host: target.host }, agent, host: target.hostname, port: targetPort }
    : { method, path: target.origin + path, headers: { Host: target.host }, agent, host: "127.0.0.1", port };
  return new Promise((resolve, reject) => {
    const request = http.request(options, (response) => {
      const chunks = [];
      response.on("data", (chunk) => chunks.push(chunk));
      response.on("end", () => resolve({ status: response.statusCode, via: response.headers.via, body: Buffer.concat(chunks) }));
    });
    request.on("error", reject);
    request.end(body);
  });
}

const hello = await send("GET", "/hello?a=1");
const echo = await send("POST", "/echo", Buffer.alloc(1000000, "x"));
const big = await send("GET", "/download");
console.log(JSON.stringify({
  hello: hello.body.toString(), via: hello.via ?? null, echo: echo.body.length, big: big.body.length,
  statuses: [hello.status, echo.status, big.status],
}));
process.exit(0);
