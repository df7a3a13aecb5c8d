import QMP

enum Version {
    static let number = "0.1.0"
    static var text: String {
        let qmp = QMPVersion.current
        return "godwit \(number), QMP and migration stream of QEMU \(qmp.major).\(qmp.minor)"
    }
}
