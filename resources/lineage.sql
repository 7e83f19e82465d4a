-- The lineage index: what was made from what, with which settings, and how well it did.
--
-- An index over the manifests and tables in `artifacts/` and the records in `runs/`. It can be deleted at any time and is
-- rebuilt to the same content. `artifact_id` is the artifact's folder below `artifacts/`: stage/key/data version, hashes
-- cut to 20 digits. Times are UTC. JSON columns are read with ->> : config->>'learning_rate'.
--
-- There are no foreign keys: an input may have been deleted from the store and its edge is still true.

-- The schema this file was made with; another one means that the index is rebuilt.
CREATE TABLE index_info (schema_sha256 VARCHAR NOT NULL);

-- One row an artifact: what was computed (key, code, config, seed), what came out (data_version), and where and when.
CREATE TABLE artifacts (
    artifact_id  VARCHAR PRIMARY KEY,
    stage        VARCHAR NOT NULL,
    key          VARCHAR NOT NULL,
    data_version VARCHAR NOT NULL,
    code_version VARCHAR,
    config       JSON,
    seed         BIGINT,
    created_at   TIMESTAMP,
    wall_s       DOUBLE,
    git_commit   VARCHAR,
    device       VARCHAR,
    python       VARCHAR,
    packages     JSON,      -- {"torch": "2.13.0", ...}
    timings      JSON
);

-- Edges: artifact_id was computed from input_artifact_id, which it knows under a name ("dataset", "policy").
CREATE TABLE artifact_inputs (
    artifact_id       VARCHAR NOT NULL,
    name              VARCHAR NOT NULL,
    input_artifact_id VARCHAR NOT NULL
);

-- Files from outside the store that a stage read, by content.
CREATE TABLE input_files (
    artifact_id VARCHAR NOT NULL,
    name        VARCHAR NOT NULL,
    sha256      VARCHAR NOT NULL,
    path        VARCHAR
);

-- Files of an artifact; paths are relative to its folder.
CREATE TABLE artifact_files (
    artifact_id VARCHAR NOT NULL,
    path        VARCHAR NOT NULL,
    size        BIGINT,     -- bytes
    sha256      VARCHAR
);

-- Metrics while a stage ran, from its progress log; steps count within a phase.
CREATE TABLE metrics (
    artifact_id VARCHAR NOT NULL,
    phase       VARCHAR NOT NULL,
    step        BIGINT NOT NULL,
    name        VARCHAR NOT NULL,
    value       DOUBLE
);

-- Final metrics of an artifact.
CREATE TABLE results (
    artifact_id VARCHAR NOT NULL,
    name        VARCHAR NOT NULL,
    value       DOUBLE
);

-- Propositions about an artifact that were checked when it was made.
CREATE TABLE checks (
    artifact_id VARCHAR NOT NULL,
    name        VARCHAR NOT NULL,
    passed      BOOLEAN NOT NULL,
    detail      VARCHAR,
    blocking    BOOLEAN
);

-- Rows of an `instructions` artifact. row_id is the hash of the row's content.
CREATE TABLE dataset_rows (
    artifact_id VARCHAR NOT NULL,
    row_id      VARCHAR,
    prompt_id   VARCHAR,
    split       VARCHAR,    -- train, validation or test
    source_line BIGINT,
    instruction VARCHAR,
    input       VARCHAR,
    output      VARCHAR
);

-- Input rows that a stage refused, and why.
CREATE TABLE quarantined_rows (
    artifact_id VARCHAR NOT NULL,
    reason      VARCHAR,
    source_line BIGINT,
    detail      VARCHAR
);

-- Preference pairs. Those of `preference_pairs` have a split; those of `human_preferences` are not divided yet.
CREATE TABLE preference_pairs (
    artifact_id VARCHAR NOT NULL,
    split       VARCHAR,    -- train, validation or NULL
    row_id      VARCHAR,
    prompt_id   VARCHAR,
    prompt      VARCHAR,
    chosen      VARCHAR,
    rejected    VARCHAR,
    source      VARCHAR,    -- dataset, sampled or human
    labeller    VARCHAR
);

-- One row an `evaluation` artifact: which policy was judged by what, on how many prompts.
CREATE TABLE evaluations (
    artifact_id        VARCHAR NOT NULL,
    policy_artifact_id VARCHAR,
    judge              VARCHAR,
    prompts            BIGINT
);

-- Responses of an evaluated policy with their scores and decoding settings.
CREATE TABLE evaluation_examples (
    artifact_id   VARCHAR NOT NULL,
    prompt_id     VARCHAR,
    prompt        VARCHAR,
    reference     VARCHAR,
    response      VARCHAR,
    judge_score   DOUBLE,
    learned_score DOUBLE,   -- NULL where there is no reward model
    kl_nats       DOUBLE,
    tokens        BIGINT,
    ended         BOOLEAN,  -- the response ended by itself, not at the length limit
    judge         VARCHAR,
    temperature   DOUBLE
);

-- Cells of a `comparison` artifact's table, one row a policy and column. Text cells have no value, numbers no text.
CREATE TABLE comparison_rows (
    artifact_id VARCHAR NOT NULL,
    policy      VARCHAR,
    judge       VARCHAR,
    name        VARCHAR NOT NULL,
    value       DOUBLE,
    text        VARCHAR
);

-- One row a run record. record_stamp tells whether the file has changed since it was indexed.
CREATE TABLE runs (
    run_id       VARCHAR PRIMARY KEY,
    recipe       VARCHAR,
    overrides    JSON,
    started_by   VARCHAR,
    started_at   TIMESTAMP,
    finished_at  TIMESTAMP, -- NULL while it runs
    status       VARCHAR,   -- running, success, failed or interrupted
    record_stamp VARCHAR NOT NULL
);

-- What each asset was in a run: made by it, or reused.
CREATE TABLE run_assets (
    run_id      VARCHAR NOT NULL,
    asset       VARCHAR NOT NULL,
    stage       VARCHAR,
    artifact_id VARCHAR NOT NULL,
    reused      BOOLEAN
);

-- Everything an artifact was made from, however far back; the shortest way counts. Read the other way round
-- (WHERE ancestor_id = ...) it says everything that was made from an artifact.
CREATE VIEW ancestors AS
WITH RECURSIVE walk (artifact_id, ancestor_id, depth) AS (
    SELECT artifact_id, input_artifact_id, 1 FROM artifact_inputs
    UNION
    SELECT walk.artifact_id, edge.input_artifact_id, walk.depth + 1
    FROM walk JOIN artifact_inputs AS edge ON edge.artifact_id = walk.ancestor_id
)
SELECT artifact_id, ancestor_id, min(depth) AS depth FROM walk GROUP BY artifact_id, ancestor_id;

-- From a number on a report to the settings, seeds and code behind it: an artifact (depth 0) and all its ancestors.
CREATE VIEW provenance AS
WITH family AS (
    SELECT artifact_id, ancestor_id, depth FROM ancestors
    UNION ALL
    SELECT artifact_id, artifact_id, 0 FROM artifacts
)
SELECT family.artifact_id, family.depth, family.ancestor_id, made.stage, made.config, made.seed, made.code_version,
       made.git_commit, made.device, made.packages, made.created_at
FROM family JOIN artifacts AS made ON made.artifact_id = family.ancestor_id;

-- From a row to everything that could have learned from it: training rows and pairs, and the artifacts made from them.
-- Filter by stage (sft_model, reward_model, dpo_policy, ppo_policy) for the models.
CREATE VIEW learned_from AS
WITH learnable AS (
    SELECT 'dataset_row' AS kind, artifact_id, row_id, prompt_id FROM dataset_rows WHERE split = 'train'
    UNION ALL
    SELECT 'preference_pair', artifact_id, row_id, prompt_id FROM preference_pairs WHERE split = 'train'
)
SELECT learnable.kind, learnable.row_id, learnable.prompt_id, learnable.artifact_id AS source_artifact_id,
       ancestors.artifact_id, made.stage, ancestors.depth
FROM learnable
JOIN ancestors ON ancestors.ancestor_id = learnable.artifact_id
JOIN artifacts AS made ON made.artifact_id = ancestors.artifact_id;

-- Responses beside the policy that gave them.
CREATE VIEW judged_responses AS
SELECT evaluations.policy_artifact_id, examples.*
FROM evaluation_examples AS examples JOIN evaluations ON evaluations.artifact_id = examples.artifact_id;

-- The comparison of each recipe's latest run that has one.
CREATE VIEW latest_comparison AS
WITH latest AS (
    SELECT runs.recipe, max_by(run_assets.artifact_id, (runs.started_at, runs.run_id)) AS artifact_id,
           max_by(runs.run_id, (runs.started_at, runs.run_id)) AS run_id
    FROM runs JOIN run_assets ON run_assets.run_id = runs.run_id
    WHERE run_assets.stage = 'comparison'
    GROUP BY runs.recipe
)
SELECT latest.recipe, latest.run_id, cells.*
FROM latest JOIN comparison_rows AS cells ON cells.artifact_id = latest.artifact_id;
