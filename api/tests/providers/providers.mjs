// Two real providers for tests, in one process that ends with its standard input: one that speaks OpenID Connect as it is
// meant, and one shaped as GitHub: other paths, a number for an account, errors with status 200, forms instead of JSON. Both
// check everything that a provider checks: client, secret, redirect, PKCE, that a code is used once.
//
// Without a page, the browser is logged in as the account that `login_hint` names, else as the first account; `nobody`
// declines.
// A test changes accounts by PUT /control/accounts/{id}, and makes the second one answer by forms by PUT /control/form.

import { createServer } from "node:http";
import Provider from "oidc-provider";

const origin = process.argv[2];

// GitHub's own members under `github`; the rest are OpenID Connect's claims.
const accounts = new Map();
let form = false;

function listen() {
  return new Promise((resolve) => {
    const server = createServer();
    server.listen(0, "127.0.0.1", () => resolve([server, `http://127.0.0.1:${server.address().port}`]));
  });
}

function body(req) {
  return new Promise((resolve) => {
    let text = "";
    req.on("data", (chunk) => (text += chunk)).on("end", () => resolve(text));
  });
}

function configuration(name, more) {
  return {
    clients: [
      {
        client_id: "messenger",
        client_secret: "the-client-secret-of-these-tests",
        redirect_uris: [`${origin}/api/oauth/${name}/callback`],
        token_endpoint_auth_method: more.auth,
      },
    ],
    pkce: { required: () => true },
    claims: { openid: ["sub"], profile: ["preferred_username", "picture"] },
    features: { devInteractions: { enabled: false } },
    interactions: { url: (_, interaction) => `/interaction/${interaction.uid}` },
    findAccount: (_, id) => ({ accountId: id, claims: () => ({ ...accounts.get(id), sub: id }) }),
    cookies: { keys: ["only for tests"] },
    ...more.configuration,
  };
}

async function interaction(provider, req, res) {
  const { params } = await provider.interactionDetails(req, res);
  if (params.login_hint === "nobody") {
    return provider.interactionFinished(req, res, { error: "access_denied" });
  }
  const accountId = params.login_hint ?? accounts.keys().next().value;
  const grant = new provider.Grant({ accountId, clientId: params.client_id });
  grant.addOIDCScope(params.scope);
  return provider.interactionFinished(req, res, { login: { accountId }, consent: { grantId: await grant.save() } });
}

async function control(req, res) {
  const [, , what, id] = req.url.split("/");
  const value = JSON.parse(await body(req));
  if (what === "accounts") accounts.set(id, value);
  else form = value;
  res.writeHead(204).end();
}

async function start(name, more) {
  const [server, issuer] = await listen();
  const provider = new Provider(issuer, configuration(name, more));
  more.shape?.(provider);
  const rest = provider.callback();
  server.on("request", (req, res) => {
    const own = req.url.startsWith("/interaction/") ? interaction(provider, req, res)
      : req.url.startsWith("/control/") ? control(req, res)
      : rest(req, res);
    Promise.resolve(own).catch((error) => {
      console.error(error);
      res.writeHead(500).end();
    });
  });
  return issuer;
}

function asGitHub(provider) {
  provider.use(async (ctx, next) => {
    if (ctx.path === "/user") {
      const [, token] = /^Bearer (.+)$/.exec(ctx.get("authorization")) ?? [];
      const found = token && ctx.get("user-agent") ? await provider.AccessToken.find(token) : undefined;
      ctx.status = found ? 200 : 401;
      ctx.body = found ? accounts.get(found.accountId).github : { message: "Bad credentials" };
      return;
    }
    await next();
    if (ctx.path !== "/login/oauth/access_token") return;
    const said = ctx.body;
    if (said.error) ctx.status = 200;
    if (form || !ctx.get("accept").includes("json")) {
      ctx.body = new URLSearchParams(said).toString();
      ctx.type = "application/x-www-form-urlencoded";
    }
  });
}

const oidc = await start("oidc", { auth: "client_secret_basic" });
const github = await start("github", {
  auth: "client_secret_post",
  shape: asGitHub,
  configuration: {
    scopes: ["read:user"],
    routes: { authorization: "/login/oauth/authorize", token: "/login/oauth/access_token" },
  },
});
console.log(JSON.stringify({ oidc, github }));
process.stdin.on("end", () => process.exit()).resume();
