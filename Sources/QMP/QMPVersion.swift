/// What `query-version` and the greeting tell.
///
/// The member is called `qemu` by the protocol; clients read it to know which commands to expect, so Godwit gives the
/// version of QEMU whose migration commands it speaks, and its own name as the package.
public struct QMPVersion: Sendable, Equatable {
    public var major: Int
    public var minor: Int
    public var micro: Int
    public var package: String

    public init(major: Int, minor: Int, micro: Int, package: String) {
        self.major = major
        self.minor = minor
        self.micro = micro
        self.package = package
    }

    public static let current = QMPVersion(major: 7, minor: 2, micro: 0, package: "Godwit")

    var json: JSON {
        [
            "qemu": ["major": JSON(major), "minor": JSON(minor), "micro": JSON(micro)],
            "package": .string(package),
        ]
    }
}
