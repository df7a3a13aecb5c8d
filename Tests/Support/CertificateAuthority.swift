import Glibc
import Host

/// An authority of a test's own, by the program `openssl`: makes folders of certificates with QEMU's file names.
public final class CertificateAuthority {
    /// When a certificate is valid, as seen from now.
    public enum Validity: Sendable {
        case now, expired, notYet

        /// As `openssl ca` reads dates.
        fileprivate var dates: (start: String, end: String) {
            switch self {
            case .now: ("20200101000000Z", "20990101000000Z")
            case .expired: ("20200101000000Z", "20210101000000Z")
            case .notYet: ("20980101000000Z", "20990101000000Z")
            }
        }
    }

    public enum Purpose: String, Sendable { case server, client }

    public static let isInstalled: Bool = {
        let child = try? ChildProcess(
            ["openssl", "version"], input: Descriptor.open("/dev/null", O_RDONLY),
            output: Descriptor.open("/dev/null", O_WRONLY), error: Descriptor.open("/dev/null", O_WRONLY))
        return child?.wait(deadline: .after(seconds: 5))?.isSuccess == true
    }()

    private let folder: String
    private var counter = 0

    /// - Parameters:
    ///   - folder: where its files lie; made here.
    ///   - name: its common name.
    public init(_ name: String, in folder: String) throws {
        self.folder = folder
        try FileSystem.makeFolder(folder)
        try write("", to: "index.txt")
        try write("1000\n", to: "serial")
        try write("1000\n", to: "crlnumber")
        try write(configuration(hosts: []), to: "ca.conf")
        try openssl(
            [
                "req", "-x509", "-new", "-config", file("ca.conf"), "-extensions", "authority", "-days", "3650",
                "-subj", "/O=Godwit tests/CN=\(name)", "-keyout", file("ca-key.pem"), "-out", file("ca-cert.pem"),
            ] + Self.newKey)
    }

    /// Puts `ca-cert.pem`, and a certificate and key of the purpose's names, into a folder, which is made.
    /// - Parameter hosts: of a server, as `DNS:name` and `IP:address`.
    public func issue(
        _ purpose: Purpose, to folder: String, name: String, hosts: [String] = ["DNS:localhost", "IP:127.0.0.1"],
        validity: Validity = .now, as fileName: Purpose? = nil
    ) throws {
        try trust(in: folder)
        counter += 1
        let kind = (fileName ?? purpose).rawValue
        let request = file("\(counter).csr")
        try write(configuration(hosts: hosts), to: "\(counter).conf")
        try openssl(
            ["req", "-new", "-config", file("ca.conf"), "-subj", "/O=Godwit tests/CN=\(name)"] + Self.newKey
                + ["-keyout", "\(folder)/\(kind)-key.pem", "-out", request])
        try openssl(
            authority("\(counter).conf") + [
                "-batch", "-notext", "-extensions", purpose.rawValue, "-startdate", validity.dates.start, "-enddate",
                validity.dates.end, "-in", request, "-out", "\(folder)/\(kind)-cert.pem",
            ])
    }

    /// Puts `ca-cert.pem` into a folder, which is made.
    public func trust(in folder: String) throws {
        try FileSystem.makeFolder(folder)
        try Descriptor.create("\(folder)/ca-cert.pem").writeAll(Descriptor.contents(of: file("ca-cert.pem")))
    }

    /// Revokes the certificate of one folder, and puts the list `ca-crl.pem` into another.
    public func revoke(_ purpose: Purpose, of folder: String, listIn listFolder: String) throws {
        try openssl(authority("ca.conf") + ["-revoke", "\(folder)/\(purpose.rawValue)-cert.pem"])
        try openssl(authority("ca.conf") + ["-gencrl", "-out", "\(listFolder)/ca-crl.pem"])
    }

    /// Writes a `keys.psk`.
    public static func writeKeys(_ keys: [String: String], to folder: String) throws {
        try FileSystem.makeFolder(folder)
        let lines = keys.sorted { $0.key < $1.key }.map { "\($0.key):\($0.value)\n" }
        try Descriptor.create("\(folder)/keys.psk").writeAll(Array(lines.joined().utf8))
    }

    // MARK: The program

    private static let newKey = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]

    private func file(_ name: String) -> String { "\(folder)/\(name)" }

    private func write(_ text: String, to name: String) throws {
        try Descriptor.create(file(name)).writeAll(Array(text.utf8))
    }

    private func authority(_ configuration: String) -> [String] {
        ["ca", "-config", file(configuration), "-cert", file("ca-cert.pem"), "-keyfile", file("ca-key.pem")]
    }

    private func configuration(hosts: [String]) -> String {
        let names = hosts.isEmpty ? "" : "subjectAltName = \(hosts.joined(separator: ","))\n"
        return """
            [ca]
            default_ca = here
            [here]
            database = \(file("index.txt"))
            serial = \(file("serial"))
            crlnumber = \(file("crlnumber"))
            new_certs_dir = \(folder)
            default_md = sha256
            default_days = 30
            default_crl_days = 30
            policy = names
            unique_subject = no
            [names]
            organizationName = optional
            commonName = supplied
            [req]
            distinguished_name = subject
            [subject]
            [authority]
            basicConstraints = critical, CA:TRUE
            keyUsage = critical, keyCertSign, cRLSign
            subjectKeyIdentifier = hash
            [server]
            basicConstraints = critical, CA:FALSE
            keyUsage = critical, digitalSignature, keyEncipherment
            extendedKeyUsage = serverAuth
            \(names)
            [client]
            basicConstraints = critical, CA:FALSE
            keyUsage = critical, digitalSignature, keyEncipherment
            extendedKeyUsage = clientAuth

            """
    }

    private func openssl(_ arguments: [String]) throws {
        let log = file("openssl.log")
        let child = try ChildProcess(
            ["openssl"] + arguments, input: Descriptor.open("/dev/null", O_RDONLY),
            output: Descriptor.open("/dev/null", O_WRONLY), error: Descriptor.create(log))
        guard child.wait(deadline: .after(seconds: 30))?.isSuccess == true else {
            let words = String(decoding: (try? Descriptor.contents(of: log)) ?? [], as: UTF8.self)
            throw TestObstacle("openssl \(arguments.joined(separator: " ")): \(words)")
        }
    }
}
