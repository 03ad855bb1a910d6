//! Databases with other isolation levels, encodings and locales, and poolers in front of them.

use std::{
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use api::store::{
    Database, StoreError,
    session::{self, Route},
};
use futures_util::future::join_all;
use prometheus_client::metrics::counter::Counter;
use serde_json::json;
use sqlx::{Connection, PgConnection, PgPool, postgres::PgPoolOptions};
use testkit::{
    http::{Call, Client},
    ports::free_port,
    process::Process,
    until,
};

use crate::{
    failures::metric,
    process::{assert_says, database_url, key_file, run, serve_from},
    support::{App, SECRET, add_users, database, execute, number, once_not_busy, options, text},
};

/// Debian's `nobody`: `PgBouncer` refuses to run as root.
const NOBODY: u32 = 65_534;

fn log_in(app: &App, name: &str) -> Call {
    app.post("/api/login").json(&json!({ "username": name }))
}

fn encoded(text: &str) -> String {
    form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

async fn set_default(pool: &PgPool, setting: &str, value: &str) {
    let database = pool.connect_options().get_database().unwrap().to_owned();
    execute(pool, format!(r#"ALTER DATABASE "{database}" SET {setting} = '{value}'"#)).await;
}

async fn send_eighty(app: &App, pool: &PgPool) {
    let (john, jane, conversation) = app.pair(pool).await;
    let sends = (0..80).map(|number: usize| {
        let (sender, conversation) = (if number.is_multiple_of(2) { &john } else { &jane }, &conversation);
        let number = number.to_string();
        once_not_busy(move || sender.post_message(conversation, &number).header("idempotency-key", &number))
    });
    let statuses: Vec<_> = join_all(sends).await.into_iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [201; 80]);
    assert_eq!(metric(app, "messenger_api_database_conflicts_total").await, Some(0));
}

/// Whether a connection is a session or each transaction sets them.
async fn assert_own_settings(pool: &PgPool) {
    for sessions in [false, true] {
        let database = database(pool, 1);
        if sessions {
            database.use_sessions();
        }
        let read = "SELECT current_setting('transaction_isolation'), current_setting('lock_timeout'),
                           current_setting('log_parameter_max_length_on_error')";
        let settings = database
            .run(async |connection| {
                sqlx::query_as::<_, (String, String, String)>(read).fetch_one(connection).await
            })
            .await
            .unwrap();
        assert_eq!(settings, ("read committed".to_owned(), "2s".to_owned(), "0".to_owned()));
        database.close().await;
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn defaults_of_the_database_do_not_change_how_sends_end(pool: PgPool) {
    for isolation in ["serializable", "repeatable read"] {
        set_default(&pool, "default_transaction_isolation", isolation).await;
        for (setting, value) in [
            ("lock_timeout", "1ms"),
            ("log_parameter_max_length_on_error", "-1"),
            ("idle_session_timeout", "500ms"),
            ("TimeZone", "Asia/Kathmandu"),
            ("DateStyle", "German, DMY"),
            ("IntervalStyle", "sql_standard"),
            ("bytea_output", "escape"),
            ("standard_conforming_strings", "off"),
            ("client_encoding", "LATIN1"),
            ("extra_float_digits", "-15"),
        ] {
            set_default(&pool, setting, value).await;
        }
        assert_own_settings(&pool).await;
        let app = App::with(&pool, |config| config.database_pool_size = 16).await;
        send_eighty(&app, &pool).await;
        app.stop().await;
        execute(&pool, "TRUNCATE messenger.users CASCADE").await;
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn a_conflict_is_repeated_once_then_unavailable(pool: PgPool) {
    let conflicts = Counter::default();
    let database = Database::new(options(&pool), 1, conflicts.clone());
    execute(
        &pool,
        "CREATE SEQUENCE tries;
         CREATE FUNCTION conflict(until bigint, state text) RETURNS bigint LANGUAGE plpgsql AS $$
         BEGIN
             IF nextval('tries') < until THEN
                 RAISE EXCEPTION 'conflict' USING ERRCODE = state;
             END IF;
             RETURN currval('tries');
         END $$",
    )
    .await;
    let conflict = async |until: i64, state: &str| {
        execute(&pool, "ALTER SEQUENCE tries RESTART").await;
        database
            .run(async |connection| {
                let query = sqlx::query_scalar::<_, i64>("SELECT conflict($1, $2)").bind(until).bind(state);
                query.fetch_one(connection).await
            })
            .await
    };
    for state in ["40001", "40P01", "P0002"] {
        for sessions in [false, true] {
            if sessions {
                database.use_sessions();
            }
            let counted = conflicts.get();
            assert_eq!(conflict(2, state).await.unwrap(), 2);
            assert_eq!(conflicts.get(), counted + 1);
            assert!(matches!(conflict(3, state).await, Err(StoreError::Unavailable(_))));
            assert_eq!(conflicts.get(), counted + 3);
        }
    }
    assert!(matches!(conflict(2, "22023").await, Err(StoreError::Fault(_))), "no conflict");
}

#[sqlx::test(migrations = false)]
async fn tables_of_a_host_application_are_left_alone(pool: PgPool) {
    execute(
        &pool,
        "CREATE TABLE public.users (username text);
         INSERT INTO public.users VALUES ('host');
         CREATE TABLE public._sqlx_migrations (version bigint PRIMARY KEY, checksum bytea);
         INSERT INTO public._sqlx_migrations VALUES (1, 'host')",
    )
    .await;
    api::maintenance::migrate(options(&pool)).await.unwrap();
    let app = App::start(&pool).await;
    send_eighty(&app, &pool).await;
    app.stop().await;
    let own = "SELECT count(*) FROM public.users, public._sqlx_migrations WHERE username = 'host' AND checksum = 'host'";
    assert_eq!(number(&pool, own).await, 1);
    let tables =
        "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'";
    assert_eq!(number(&pool, tables).await, 2);
}

#[sqlx::test(migrations = false)]
async fn changed_functions_are_replaced_once_by_concurrent_migrates(pool: PgPool) {
    let migrate = || api::maintenance::migrate(options(&pool));
    let sets = async || -> Vec<(Vec<u8>, chrono::DateTime<chrono::Utc>)> {
        let sets = "SELECT checksum, applied_at FROM messenger.function_sets ORDER BY applied_at";
        sqlx::query_as(sets).fetch_all(&pool).await.unwrap()
    };
    let migrate_twice_at_once = async || {
        let (one, other) = tokio::join!(migrate(), migrate());
        one.and(other).unwrap();
    };
    migrate_twice_at_once().await;
    let first = sets().await;
    assert_eq!(first.len(), 1);
    migrate_twice_at_once().await;
    assert_eq!(sets().await, first, "nothing is applied again");

    execute(&pool, "CREATE OR REPLACE FUNCTION messenger.session_is_live(_session bigint, _user bigint) RETURNS boolean LANGUAGE sql AS $$ SELECT true $$;
         UPDATE messenger.function_sets SET checksum = 'older'").await;
    migrate_twice_at_once().await;
    let second = sets().await;
    assert_eq!((second.len(), &second[0].0[..], &second[1].0), (2, &b"older"[..], &first[0].0));
    let live = "SELECT messenger.session_is_live(1, 1)";
    let live: bool = sqlx::query_scalar(live).fetch_one(&pool).await.unwrap();
    assert!(!live, "the function of this build is in place");
}

/// The roles and rights of `docs/deploy.md`.
#[sqlx::test(migrations = false)]
async fn a_server_needs_no_right_to_change_the_schema(pool: PgPool) {
    let name = options(&pool).get_database().unwrap().to_owned();
    let [owner, server] = ["owner", "server"].map(|role| format!("{role}_{}", &name[name.len() - 24..]));
    let by = |role: &str| options(&pool).username(role).password("secret");
    let roles = format!(
        r#"CREATE ROLE "{owner}" LOGIN PASSWORD 'secret'; CREATE ROLE "{server}" LOGIN PASSWORD 'secret';
           CREATE SCHEMA messenger AUTHORIZATION "{owner}";
           GRANT USAGE ON SCHEMA messenger TO "{server}";
           ALTER DEFAULT PRIVILEGES FOR ROLE "{owner}" IN SCHEMA messenger
               GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO "{server}";
           ALTER DEFAULT PRIVILEGES FOR ROLE "{owner}" IN SCHEMA messenger GRANT USAGE ON SEQUENCES TO "{server}""#
    );
    execute(&pool, roles).await;
    api::maintenance::migrate(by(&owner)).await.unwrap();
    let refused = api::maintenance::migrate(by(&server)).await;
    assert!(format!("{:#}", refused.unwrap_err()).contains("permission denied"));
    let app = App::with(&pool, |config| config.database = by(&server)).await;
    send_eighty(&app, &pool).await;
    app.stop().await;
    execute(
        &pool,
        format!(r#"DROP OWNED BY "{server}", "{owner}" CASCADE; DROP ROLE "{server}", "{owner}""#),
    )
    .await;
}

/// Another database on the same server, made with these options.
async fn make_database(pool: &PgPool, name: &str, options: &str) -> String {
    let own = pool.connect_options().get_database().unwrap().to_owned();
    // A name has 63 bytes at most, and sqlx's has nearly as many.
    let name = format!("{name}_{}", &own[own.len() - 24..]);
    execute(pool, format!(r#"DROP DATABASE IF EXISTS "{name}""#)).await;
    execute(pool, format!(r#"CREATE DATABASE "{name}" TEMPLATE template0 {options}"#)).await;
    name
}

async fn drop_database(pool: &PgPool, name: &str) {
    execute(pool, format!(r#"DROP DATABASE "{name}" WITH (FORCE)"#)).await;
}

#[sqlx::test(migrations = false)]
async fn an_encoding_that_does_not_hold_every_text_is_refused(pool: PgPool) {
    let key = key_file();
    for encoding in ["SQL_ASCII", "LATIN1"] {
        let options = format!("ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'");
        let name = make_database(&pool, "encoding", &options).await;
        let url = database_url(&pool);
        let url = format!("{}/{name}", url.rsplit_once('/').unwrap().0);
        let settings = [
            ("DATABASE_URL", url.as_str()),
            ("REDIS_URL", "redis://127.0.0.1:1"),
            ("INTERNAL_SECRET", SECRET),
            ("SIGNING_KEY_FILES", key.path().to_str().unwrap()),
        ];
        let serve =
            ["serve", "--listen=127.0.0.1:0", "--internal-listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0"];
        for command in [&["migrate"][..], &["check-config"], &serve] {
            let (success, said) = run(command, &settings);
            assert!(!success, "{said}");
            assert_says(&said, &[encoding, &name, "CREATE DATABASE name ENCODING 'UTF8' TEMPLATE template0"]);
        }
        drop_database(&pool, &name).await;
    }
}

#[sqlx::test(migrations = false)]
async fn names_are_found_in_either_case_under_any_locale(pool: PgPool) {
    let name = make_database(&pool, "locale", "ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'").await;
    let options = options(&pool).database(&name);
    let own = PgPoolOptions::new().max_connections(2).connect_with(options).await.unwrap();
    api::store::schema::MIGRATIONS.run(&own).await.unwrap();
    let app = App::start(&own).await;
    let me = app.user(&own, "me").await;
    for name in ["Élodie", "ДМИТРИЙ", "Ὀδυσσεύς", "STRAẞE", "Ⓐnna", "𐐀lphabet"] {
        app.user(&own, name).await;
    }
    for (search, found) in [
        ("é", "Élodie"),
        ("ДМи", "ДМИТРИЙ"),
        ("ὈΔΥΣΣΕΎΣ", "Ὀδυσσεύς"),
        ("straß", "STRAẞE"),
        ("𐐨L", "𐐀lphabet"),
    ] {
        assert_eq!(me.usernames(&encoded(search)).expect(200).await.json(), json!([found]), "{search}");
    }
    assert_eq!(log_in(&app, "ÉLODIE").expect(200).await.json()["authUser"]["username"], "Élodie");

    // Every letter that has one lower and one upper form.
    let letters: Vec<(String, String)> = (char::MIN..=char::MAX)
        .filter_map(|upper| {
            let mut lower = upper.to_lowercase();
            let (lower, None) = (lower.next()?, lower.next()) else { return None };
            let mut back = lower.to_uppercase();
            (lower != upper && (back.next(), back.next()) == (Some(upper), None))
                .then(|| (upper.to_string(), lower.to_string()))
        })
        // Newer than the table.
        .filter(|(upper, _)| {
            !matches!(upper.chars().next(), Some('\u{a7ce}'..='\u{a7d5}' | '\u{16ea0}'..='\u{16eb8}'))
        })
        .collect();
    assert!(letters.len() > 1_300);
    let (upper, lower): (Vec<_>, Vec<_>) = letters.into_iter().unzip();
    let missed: Vec<(String, String)> = sqlx::query_as(
        "SELECT upper, lower FROM unnest($1::text[], $2::text[]) AS letter (upper, lower)
         WHERE messenger.fold_name(upper) <> messenger.fold_name(lower)",
    )
    .bind(upper)
    .bind(lower)
    .fetch_all(&own)
    .await
    .unwrap();
    assert_eq!(missed, []);
    app.stop().await;
    own.close().await;
    drop_database(&pool, &name).await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn both_normal_forms_of_a_name_are_one_persons(pool: PgPool) {
    const NFC: &str = "Jos\u{e9}";
    const NFD: &str = "Jose\u{301}";
    let app = App::start(&pool).await;
    let me = app.user(&pool, "me").await;
    for stored in [NFC, NFD] {
        let jose = app.user(&pool, stored).await;
        for spelling in [NFC, NFD, "JOS\u{c9}", "JOSE\u{301}"] {
            let logged_in = log_in(&app, spelling).expect(200).await.json();
            assert_eq!(text(&logged_in["authUser"]["id"]), jose.id.to_string(), "{stored:?} by {spelling:?}");
            let found = me.usernames(&encoded(spelling)).expect(200).await.json();
            assert_eq!(found, json!([stored]), "by {spelling:?}");
            let started = me.start_conversation(spelling).send().await.unwrap();
            assert!([201, 302].contains(&started.status), "{stored:?} by {spelling:?}: {}", started.text());
        }
        // An exact name is found even if others differ from it by case; several other matches are ambiguous.
        let other = app.user(&pool, &stored.to_uppercase()).await;
        let logged_in = log_in(&app, &stored.to_uppercase()).expect(200).await.json();
        assert_eq!(text(&logged_in["authUser"]["id"]), other.id.to_string());
        assert_eq!(log_in(&app, &stored.to_lowercase()).send().await.unwrap().status, 404);
        execute(&pool, format!("DELETE FROM messenger.users WHERE id IN ({}, {})", jose.id, other.id)).await;
    }
    app.stop().await;
}

struct Program(PathBuf, (u32, u32));

/// At most one of each version: on PATH, where Debian has it, and those that `DEV_PGBOUNCERS` names.
fn pgbouncers() -> Vec<Program> {
    let mut found: Vec<Program> = Vec::new();
    let named = std::env::var_os("DEV_PGBOUNCERS").unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    for file in std::env::split_paths(&named).chain(in_path.map(|folder| folder.join("pgbouncer"))) {
        let Ok(output) = Command::new(&file).arg("--version").output() else { continue };
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let version =
            said.lines().next().and_then(|line| line.strip_prefix("PgBouncer ")).and_then(|version| {
                let mut parts = version.split('.').map(|part| part.parse().ok());
                Some((parts.next()??, parts.next()??))
            });
        if let Some(version) = version
            && !found.iter().any(|program| program.1 == version)
        {
            found.push(Program(file, version));
        }
    }
    if found.is_empty() {
        eprintln!("SKIPPED: no PgBouncer was found on this machine (apt-get install pgbouncer)");
    }
    found
}

struct Pooler {
    _process: Process,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Pooler {
    async fn start(program: &Path, url: &url::Url, settings: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let port = free_port();
        let (file, users) = (folder.path().join("pgbouncer.ini"), folder.path().join("users.txt"));
        fs::write(&users, format!("\"{}\" \"{}\"\n", url.username(), url.password().unwrap_or_default()))
            .unwrap();
        let text = format!(
            "[databases]\n* = host={} port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = {}\nauth_file = {}\n{settings}\n",
            url.host_str().unwrap(),
            url.port().unwrap(),
            if url.password().is_some() { "plain" } else { "trust" },
            users.display(),
        );
        fs::write(&file, text).unwrap();
        let mut command = Command::new(program);
        command.arg("-q").arg(&file);
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        let pooler = Self { _process: Process::start(&mut command).unwrap(), port, _folder: folder };
        until("PgBouncer accepts connections", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        pooler
    }

    fn url(&self, url: &url::Url) -> String {
        let mut url = url.clone();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(self.port)).unwrap();
        url.into()
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

/// Start-up classifies the connection to Postgres correctly every time.
async fn routes(url: &str) -> Vec<Result<Route, String>> {
    let mut found = Vec::new();
    for _ in 0..5 {
        let options = api::config::connection(url.parse().unwrap());
        let connected = session::connect(&options).await;
        found.push(connected.map(|(_, route)| route).map_err(|error| error.to_string()));
    }
    found
}

#[sqlx::test(migrations = false)]
async fn a_pooler_that_mixes_up_statements_is_refused(pool: PgPool) {
    let direct: url::Url = database_url(&pool).parse().unwrap();
    assert_eq!(routes(direct.as_str()).await, vec![Ok(Route::Direct); 5]);
    for Program(file, version) in pgbouncers() {
        let session = Pooler::start(&file, &direct, "pool_mode = session").await;
        assert_eq!(routes(&session.url(&direct)).await, vec![Ok(Route::Direct); 5], "{version:?}");

        for order in [0, 1] {
            let mut settings = format!("pool_mode = transaction\nserver_round_robin = {order}\n");
            if version >= (1, 21) {
                settings += "max_prepared_statements = 0\n";
            }
            let pooler = Pooler::start(&file, &direct, &settings).await;
            let url = pooler.url(&direct);
            for route in routes(&url).await {
                let error = route.unwrap_err();
                assert!(error.contains("mixes up the prepared statements"), "{version:?}: {error}");
            }
            let (success, said) = run(&["migrate"], &[("DATABASE_URL", &url)]);
            assert!(!success && said.contains("PgBouncer 1.21 or newer"), "{said}");
        }
    }
}

#[sqlx::test(migrations = false)]
async fn sends_work_through_a_pooler_of_transactions(pool: PgPool) {
    let direct: url::Url = database_url(&pool).parse().unwrap();
    let newest = pgbouncers().into_iter().find(|Program(_, version)| *version >= (1, 21));
    let Some(Program(file, _)) = newest else {
        eprintln!("SKIPPED: no PgBouncer of 1.21 or newer was found; DEV_PGBOUNCERS can name one");
        return;
    };
    // The database's own default must not matter here either.
    set_default(&pool, "default_transaction_isolation", "serializable").await;
    set_default(&pool, "lock_timeout", "1ms").await;
    let settings = "pool_mode = transaction\nmax_prepared_statements = 100\ndefault_pool_size = 4\nmax_client_conn = 200";
    let pooler = Pooler::start(&file, &direct, settings).await;
    let url = pooler.url(&direct);
    assert_eq!(routes(&url).await, vec![Ok(Route::Pooled); 5]);

    // It migrates twice, so it leaves no lock behind.
    let server = serve_from(&url, &[("DATABASE_POOL_SIZE", "16")]);
    add_users(&pool, ["john", "jane"]).await;
    let client = Client::default();
    let post = |path: &str, token: &str, body: serde_json::Value| {
        client.post(format!("{}{path}", server.public)).bearer(token).json(&body)
    };
    let token = post("/api/login", "", json!({ "username": "john" })).expect(200).await.json();
    let token = text(&token["token"]);
    let conversation =
        post("/api/conversations", &token, json!({ "username": "jane" })).expect(201).await.json();
    let path = format!("/api/conversations/{}/messages", text(&conversation["id"]));
    let (path, token) = (&path, &token);
    let sends = (0..80).map(|number| {
        let number = number.to_string();
        once_not_busy(move || {
            post(path, token, json!({ "content": number })).header("idempotency-key", &number)
        })
    });
    let statuses: Vec<_> = join_all(sends).await.into_iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [201; 80]);
    for column in ["count(*)", "max(seq)"] {
        let kept = format!(
            "SELECT {column} FROM messenger.feed JOIN messenger.users ON id = user_id WHERE username = 'jane'"
        );
        assert_eq!(number(&pool, kept).await, 81, "{column}");
    }

    // Hosts publish through it, and the relay works through it.
    let hosts = (0..8).map(async |n| {
        // Without the driver's own settings, which poolers refuse at the start.
        let options = api::config::connection(url.parse().unwrap());
        let mut host = PgConnection::connect_with(&options).await.unwrap();
        for turn in 0..10 {
            let mut transaction = host.begin().await.unwrap();
            for event in 0..2 {
                sqlx::query("SELECT messenger.publish($1::bigint, 'shop.n', to_jsonb($2::bigint))")
                    .bind(2_i64)
                    .bind(n * 100 + turn * 2 + event)
                    .execute(&mut *transaction)
                    .await
                    .unwrap();
            }
            if turn % 2 == 0 {
                transaction.commit().await.unwrap();
            } else {
                transaction.rollback().await.unwrap();
            }
        }
    });
    join_all(hosts).await;
    let published =
        "SELECT count(*) FROM messenger.feed AS f JOIN messenger.events AS e ON e.id = -f.event_id
                     WHERE e.kind = 'shop.n'";
    until("all is relayed", || async { number(&pool, published).await == 80 }).await;
    assert_eq!(number(&pool, "SELECT max(seq) FROM messenger.feed WHERE user_id = 2").await, 161);
    server.stop().await;
}
